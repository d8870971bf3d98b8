"""How members of a group answer each other, by HTTP: a short question, or one for many bytes.

Python's own server and client were chosen by measurement (`benchmarks/parity.py`): gRPC takes
several times the CPU seconds for a byte, and was seen to hang for good where a server ended. Here
every wait has an end, nobody is listened to for long who does not know the secret, and no memory is
taken because somebody says so.

An answer is one part, or several where many bytes are asked for, in HTTP's chunks: a question takes
as much of a CPU as a megabyte does. The code of each part is over that of the one before.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import pathlib
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.storage import threads
from lazy_orbax.tiers.parity import addresses, proof

CHUNK_BYTES, SPAN_BYTES = 2**22, 2**26
"""Of bytes that are sent: those with a digest of their own, and most for one question."""
_LONGEST_BYTES, _LONGEST_HEAD_BYTES = 2**16, 2**13
ASK, READ = "/ask", "/read"
"""The paths of a question, and of one for bytes."""
_MOST_CONNECTIONS = 256
# For one who has not shown yet that it knows the secret; and between two questions of a member.
_STRANGER_S, _IDLE_S = 10.0, 60.0
# How soon one that listens sees that it is to end.
_LOOK_S = 0.05
HEAD = struct.Struct("<HI")
"""What comes before a part of an answer: its bytes, and those of the chunk behind it."""
Told = dict[str, Any]
Part = tuple[Told, bytes | memoryview]
Tls = tuple[str, str, str]


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers members of a group, on one interface.

    Invariant, under the lock: `_open` has the connections that are served.

    Attributes:
        address: where, as `host:port`.
        secret: what whoever asks must know.
        answers: what answers at each path.
    """

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(
        self,
        host: str,
        secret: str,
        tls: Tls | None,
        answer: Callable[[Told], Told],
        read: Callable[[Told, int, int], tuple[int, memoryview]],
    ):
        """Listens.

        Args:
            host: the address of the interface.
            secret: what whoever asks must know.
            tls: paths of certificate, key and authority.
            answer: answers a question. A `KeeperError` is told to who asks.
            read: returns bytes of what is asked for, and their digest before: from where, and
                where they end.

        Raises:
            KeeperError: nobody can listen there.
        """
        self.secret, self._tls = secret, context_of(tls, ssl.PROTOCOL_TLS_SERVER)
        self.answers: dict[str, Callable[[Told], Iterator[Part]]] = {
            ASK: lambda told: iter([(answer(told), b"")]),
            READ: lambda told: _chunks(read, told),
        }
        self._open_lock, self._open = threading.Lock(), set[socket.socket]()
        self._listen(host)
        self.address = addresses.with_port(host, self.socket.getsockname()[1])
        threads.run(functools.partial(self.serve_forever, _LOOK_S), "lazy_orbax-parity-door")

    def _listen(self, host: str) -> None:
        """Listens at the first of its addresses at which it can."""
        why: OSError | None = None
        try:
            for self.address_family, where in addresses.own_addresses(host):
                try:
                    super().__init__(where, _Handler)
                    return
                except OSError as error:
                    why = error
        except (OSError, UnicodeError) as error:
            raise KeeperError(f"nobody can listen on {host}: {error}") from error
        raise KeeperError(f"nobody can listen on {host}: {why}") from why

    def get_request(self) -> tuple[socket.socket, Any]:
        """Takes a connection. What shows who it is comes later, in a thread of its own."""
        peer, where = super().get_request()
        peer.settimeout(_STRANGER_S)
        if self._tls is not None:
            peer = self._tls.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
        return peer, where

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        with self._open_lock:
            if len(self._open) >= _MOST_CONNECTIONS:
                return False
            self._open.add(request)
            return True

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a stranger may end a connection as it likes."""

    def close(self) -> None:
        """Ends every connection, and listens no more. A second call does nothing."""
        self.shutdown()
        self.server_close()
        with self._open_lock:
            left = list(self._open)
        for peer in left:
            _hang_up(peer)


class _FewLines:
    """The lines before a question: Python's server would take a hundred of 64 KiB each."""

    def __init__(self, file: Any):
        self._file, self.left_bytes = file, 0

    def readline(self, most: int) -> bytes:
        line = self._file.readline(min(most, self.left_bytes + 1))
        self.left_bytes -= len(line)
        if self.left_bytes < 0:
            raise ConnectionError(f"more than {_LONGEST_HEAD_BYTES} bytes come before a question")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Server  # type: ignore[override]

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = _FewLines(self.rfile)
        self._is_known = False

    def handle_one_request(self) -> None:
        # Whoever sends a byte from time to time is not waited for, either.
        wait_s = _IDLE_S if self._is_known else _STRANGER_S
        self._watch = threading.Timer(wait_s, _hang_up, (self.connection,))
        self._watch.daemon = True
        self._watch.start()
        self.rfile.left_bytes = _LONGEST_HEAD_BYTES
        try:
            super().handle_one_request()
        finally:
            self._watch.cancel()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        work = self.server.answers.get(self.path)
        if not length.isascii() or not length.isdigit() or int(length) > _LONGEST_BYTES or not work:
            self.close_connection = True
            self.send_error(413)
            return
        request = self.rfile.read(int(length))
        try:
            told = proof.opened(self.server.secret, self.path.encode(), request)
        except proof.NotProvenError:
            self.close_connection = True
            self.send_error(403)
            return
        self._watch.cancel()
        self._is_known = True
        self.connection.settimeout(_IDLE_S)
        self.send_response_only(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        code, before = proof.code_of(request), b""
        for found, chunk in _parts(work, told):
            part = proof.sealed(self.server.secret, code, found)
            code, head = proof.code_of(part), HEAD.pack(len(part), len(chunk)) + part
            self.connection.sendall(b"%s%x\r\n%s" % (before, len(head) + len(chunk), head))
            self.connection.sendall(chunk)
            before = b"\r\n"
        self.connection.sendall(before + b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _hang_up(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def context_of(tls: Tls | None, protocol: int) -> ssl.SSLContext | None:
    """Returns how to encrypt: both ends show a certificate.

    Raises:
        KeeperError: there are no such files, or they are no certificates.
    """
    if tls is None:
        return None
    certificate, key, authority = (str(pathlib.Path(path)) for path in tls)
    context = ssl.SSLContext(protocol)
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except OSError as error:
        raise KeeperError(f"the certificates of parity, {tls}, cannot be used: {error}") from error
    return context


def _parts(work: Callable[[Told], Iterator[Part]], told: Told) -> Iterator[Part]:
    """Yields an answer. What goes wrong is its last part."""
    try:
        yield from work(told)
    except (KeeperError, OSError, KeyError, TypeError, ValueError) as error:
        yield {"error": str(error) or repr(error)}, b""


def _chunks(read: Callable[[Told, int, int], tuple[int, memoryview]], told: Told) -> Iterator[Part]:
    first, end = int(told["first"]), int(told["end"])
    if not 0 <= first <= end <= first + SPAN_BYTES:
        raise KeeperError(f"bytes {first} to {end} are wanted, and {SPAN_BYTES} at once at most")
    for at in range(first, end, CHUNK_BYTES):
        digest, chunk = read(told, at, min(at + CHUNK_BYTES, end))
        yield {"digest": digest}, chunk
