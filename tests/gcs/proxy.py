"""A proxy before the GCS server, which breaks chosen requests, or holds them at an exact point.

A request is known by a line such as `upload run/2/default/manifest.ocdbt`: what it does, and the
object. A `Fault` says which of the lines that match its pattern it meets, and what it does to them.
What real GCS does and the server does not, the proxy does: uploads obey `ifGenerationMatch`, and
a resumable upload that is done says so again when it is sent again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import re
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
_HANG_S = 60


@dataclasses.dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        pattern: regular expression that the line of a request matches from its start.
        action: `status`: answer `status` and do not forward; `reset`: forward nothing and reset
            the connection; `lost`: forward, then reset (a lost acknowledgement); `stall`: forward
            nothing and never answer; `late`: forward when the fault is over; `mute`: forward, then
            never answer; `delay`: wait for `delay_s`, then go on; `truncate`: answer half the body;
            `flip`: change one bit in the middle of the body.
        skip: so many matching requests pass before.
        times: so many are met; the others pass.
        reached: set when a request was met; with `mute`, when the server has it.
        gone: set when the fault is over.
    """

    pattern: str
    action: str
    skip: int = 0
    times: float = float("inf")
    status: int = 503
    delay_s: float = 0.0
    met: int = 0
    seen: int = 0
    reached: threading.Event = dataclasses.field(default_factory=threading.Event)
    gone: threading.Event = dataclasses.field(default_factory=threading.Event)
    arrivals: threading.Semaphore = dataclasses.field(
        default_factory=lambda: threading.Semaphore(0)
    )

    def await_requests(self, n: int) -> None:
        """Waits until so many requests were met since it was called last."""
        for i in range(n):
            assert self.arrivals.acquire(timeout=_HANG_S), f"only {i} of {n} requests came"

    def await_request(self) -> None:
        """Waits until a request was met."""
        assert self.reached.wait(_HANG_S), f"no request {self.pattern!r} came"


def line_of(method: str, target: str, body: bytes) -> str:
    """Returns what a request does, and to which object.

    An `upload` makes an object. Where it takes two requests, the first is a `begin`.
    """
    url = urllib.parse.urlsplit(target)
    query = urllib.parse.parse_qs(url.query)
    name = urllib.parse.unquote(url.path.partition("/o/")[2])
    if url.path.startswith("/upload/"):
        found = re.search(rb'"name":\s*("(?:[^"\\]|\\.)*")', body)
        name = query["name"][0] if "name" in query else json.loads(found.group(1)) if found else "?"
        begins = query.get("uploadType") == ["resumable"] and "upload_id" not in query
        return f"{'begin' if begins else 'upload'} {name}"
    if method == "GET" and name:
        return f"{'read' if query.get('alt') == ['media'] else 'look'} {name}"
    if method == "GET" and url.path.endswith("/o"):
        return f"list {query.get('prefix', [''])[0]}"
    return f"{method.lower()} {name or url.path}"


class Proxy:
    """Listens on a port of its own and forwards to `server_port`, once that is set.

    Invariant, under the lock: `faults` and the counts in them do not change while a request is
    matched with them, and `lines` has every request in the order they came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._conditional = threading.Lock()
        self.server_port: int | None = None
        self.faults: list[Fault] = []
        self.lines: list[str] = []
        self.n_refused = 0
        self._done: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._http = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self.clear()
        self._http.shutdown()
        self._http.server_close()

    def clear(self) -> None:
        """Forgets all faults; what they hold is reset."""
        with self._lock:
            faults, self.faults = self.faults, []
        for fault in faults:
            fault.gone.set()

    @contextlib.contextmanager
    def breaking(self, *faults: Fault) -> Iterator[Fault]:
        """Has these faults for a while. Yields the first."""
        self.add(*faults)
        try:
            yield faults[0]
        finally:
            self.clear()

    def add(self, *faults: Fault) -> Fault:
        with self._lock:
            self.faults += faults
        return faults[0]

    def match(self, line: str) -> Fault | None:
        """Records a request and returns the fault that meets it."""
        with self._lock:
            self.lines.append(line)
            for fault in self.faults:
                if re.match(fault.pattern, line):
                    fault.seen += 1
                    if fault.skip < fault.seen <= fault.skip + fault.times:
                        fault.met += 1
                        fault.arrivals.release()
                        return fault
        return None

    def forward(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Asks the server, after doing what it does not do of real GCS."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(target).query)
        wanted = query.get("ifGenerationMatch")
        if method == "POST" and wanted and "name" in query:
            with self._conditional:
                bucket = target.partition("/b/")[2].partition("/")[0]
                if self._generation(bucket, query["name"][0]) != wanted[0]:
                    self.n_refused += 1
                    return 412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
                return self._ask(method, target, headers, body)
        upload = query.get("upload_id", [""])[0]
        if upload in self._done:
            return self._done[upload]
        answer = self._ask(method, target, headers, body)
        if upload and answer[0] == 200:
            self._done[upload] = answer
        return answer

    def _generation(self, bucket: str, name: str) -> str:
        quoted = urllib.parse.quote(name, safe="")
        status, _, body = self._ask("GET", f"/storage/v1/b/{bucket}/o/{quoted}", {}, b"")
        return "0" if status == 404 else str(json.loads(body)["generation"])

    def _ask(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        assert self.server_port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=_HANG_S)
        try:
            connection.request(method, target, body=body or None, headers=headers)
            response = connection.getresponse()
            content = response.read()
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP]
            return response.status, kept, content
        finally:
            connection.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # A killed client is no error here.
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, *args: object) -> None:
        del args

    def do_request(self) -> None:
        body = self._body()
        line = line_of(self.command, self.path, body)
        fault = self.proxy.match(line)
        action = fault.action if fault is not None else ""
        if fault is not None:
            if action != "mute":
                fault.reached.set()
            if action in ("stall", "late"):
                fault.gone.wait(_HANG_S)
            if action == "delay":
                time.sleep(fault.delay_s)
            if action in ("stall", "reset"):
                return self._reset()
            if action == "status":
                text = f'{{"error": {{"code": {fault.status}, "message": "refused by the test"}}}}'
                return self._answer(fault.status, [], text.encode())
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        status, kept, content = self.proxy.forward(self.command, self.path, headers, body)
        if action == "mute":
            assert fault is not None
            fault.reached.set()
            fault.gone.wait(_HANG_S)
        if action in ("lost", "mute"):
            return self._reset()
        if action == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            kept = [(k, v) for k, v in kept if k.lower() != "x-goog-hash"]
        return self._answer(status, kept, content, truncated=action == "truncate")

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

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, truncated: bool = False
    ) -> None:
        try:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if truncated else body)
        except OSError:
            self.close_connection = True  # The client has gone; a killed one always has.
        if truncated:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            # Zero seconds to linger: closing sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
