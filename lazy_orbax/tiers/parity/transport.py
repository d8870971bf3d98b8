"""How members of a group ask each other, by HTTP: a short question, or for a chunk of bytes.

Python's own server and client were chosen by measurement (`benchmarks/parity.py`): gRPC takes
several times the CPU seconds for a byte, and was seen to hang for good where a server ended. Here
every wait has an end, nobody is listened to for long who does not know the secret, and no memory is
taken because somebody says so.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import pathlib
import secrets
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.storage import threads
from lazy_orbax.tiers.parity import proof

CHUNK_BYTES = 2**22
"""Of bytes that are sent, at once."""
_LONGEST_BYTES = 2**16
_ASK, _READ = "/ask", "/read"
_MOST_CONNECTIONS = 256
# For one who has not shown yet that it knows the secret; and between two questions of a member.
_STRANGER_S, _IDLE_S = 10.0, 60.0
# How soon one that listens sees that it is to end.
_LOOK_S = 0.05
_HEAD = struct.Struct("<HI")
Told = dict[str, Any]
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
        read: Callable[[Told, int, int], memoryview],
    ):
        """Listens.

        Args:
            host: the address of the interface.
            secret: what whoever asks must know.
            tls: paths of certificate, key and authority.
            answer: answers a question. A `KeeperError` is told to who asks.
            read: returns bytes of what is asked for: from where, and where they end.

        Raises:
            KeeperError: nobody can listen there.
        """
        self.secret, self._tls = secret, _context(tls, ssl.PROTOCOL_TLS_SERVER)
        self.answers = {_ASK: lambda told: (answer(told), b""), _READ: lambda t: _part(read, t)}
        self._open_lock, self._open = threading.Lock(), set[socket.socket]()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, 0), _Handler)
        except OSError as error:
            raise KeeperError(f"nobody can listen on {host}: {error}") from error
        port = self.socket.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        threads.run(functools.partial(self.serve_forever, _LOOK_S), "lazy_orbax-parity-door")

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


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Server  # type: ignore[override]

    def handle(self) -> None:
        # Whoever sends a byte from time to time is not waited for, either.
        self._watch = threading.Timer(_STRANGER_S, _hang_up, (self.connection,))
        self._watch.daemon = True
        self._watch.start()
        try:
            super().handle()
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
        self.connection.settimeout(_IDLE_S)
        try:
            found, chunk = work(told)
        except (KeeperError, OSError, KeyError, TypeError, ValueError) as error:
            found, chunk = {"error": str(error) or repr(error)}, b""
        head = proof.sealed(self.server.secret, proof.code_of(request), found)
        self.send_response_only(200)
        self.send_header("Content-Length", str(_HEAD.size + len(head) + len(chunk)))
        self.end_headers()
        self.connection.sendall(_HEAD.pack(len(head), len(chunk)) + head)
        self.connection.sendall(chunk)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _hang_up(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def _context(tls: Tls | None, protocol: int) -> ssl.SSLContext | None:
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


def _part(read: Callable[[Told, int, int], memoryview], told: Told) -> tuple[Told, memoryview]:
    first, end = int(told["first"]), int(told["end"])
    if not 0 <= first <= end <= first + CHUNK_BYTES:
        raise KeeperError(f"bytes {first} to {end} are wanted, and {CHUNK_BYTES} at once at most")
    chunk = read(told, first, end)
    return {"digest": digest_of_bytes(chunk)}, chunk


class Peer:
    """Another member, or whoever is at its address."""

    def __init__(self, address: str, secret: str, tls: Tls | None):
        """Connects when it is asked something.

        Raises:
            KeeperError: the certificates cannot be used.
        """
        self._secret, self.address = secret, address
        context = _context(tls, ssl.PROTOCOL_TLS_CLIENT)
        if context is None:
            self._connection = http.client.HTTPConnection(address)
        else:
            self._connection = http.client.HTTPSConnection(address, context=context)

    def ask(self, told: Told, *, timeout_s: float) -> Told:
        """Returns the answer to a question.

        Raises:
            KeeperError: it refused, does not know the secret, or did not answer in time.
        """
        return self._asked(_ASK, told, 0, time.monotonic() + timeout_s)[0]

    def read(
        self, told: Told, n_bytes: int, *, timeout_s: float
    ) -> Iterator[tuple[memoryview, int]]:
        """Yields the bytes that are asked for, in chunks, each with its digest.

        Args:
            told: which bytes.
            n_bytes: how many they are.
            timeout_s: most seconds for all of them.

        Raises:
            KeeperError: as for `ask`; or what came is not what was sent.
        """
        end_s = time.monotonic() + timeout_s
        for first in range(0, n_bytes, CHUNK_BYTES):
            end = min(first + CHUNK_BYTES, n_bytes)
            more = {**told, "first": first, "end": end}
            answer, chunk = self._asked(_READ, more, end - first, end_s)
            digest = digest_of_bytes(chunk)
            if len(chunk) != end - first or answer.get("digest") != digest:
                raise KeeperError(f"what came from {self.address} is not what was asked for")
            yield chunk, digest

    def _asked(self, path: str, told: Told, most: int, end_s: float) -> tuple[Told, memoryview]:
        """Returns what is said, and the chunk behind it."""
        told = {**told, "once": secrets.token_hex(8)}
        request = proof.sealed(self._secret, path.encode(), told)
        try:
            head, chunk = self._sent(path, request, most, end_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise KeeperError(
                f"{self.address} does not answer as a member: {error or type(error).__name__}"
            ) from error
        try:
            answer = proof.opened(self._secret, proof.code_of(request), head)
        except proof.NotProvenError as error:
            raise KeeperError(f"{self.address} is no member: {error}") from error
        if "error" in answer:
            raise KeeperError(f"{self.address} says: {answer['error']}")
        return answer, chunk

    def _sent(self, path: str, request: bytes, most: int, end_s: float) -> tuple[bytes, memoryview]:
        self._wait_until(end_s)
        self._connection.request("POST", path, request)
        self._wait_until(end_s)
        response = self._connection.getresponse()
        if response.status != 200:
            raise ConnectionError(f"it refused ({response.status})")
        head_bytes, chunk_bytes = _HEAD.unpack(self._filled(response, _HEAD.size, end_s))
        if chunk_bytes > most:
            raise ConnectionError(f"it sends {chunk_bytes} bytes, wanted {most} at most")
        head = bytes(self._filled(response, head_bytes, end_s))
        chunk = self._filled(response, chunk_bytes, end_s)
        response.read(0)
        return head, chunk

    def _filled(self, response: Any, n_bytes: int, end_s: float) -> memoryview:
        content, n = memoryview(bytearray(n_bytes)), 0
        while n < n_bytes:
            self._wait_until(end_s)
            n += (more := response.readinto(content[n:]))
            if not more:
                raise ConnectionError("it hung up")
        return content

    def _wait_until(self, end_s: float) -> None:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it took too long")
        self._connection.timeout = left_s
        if self._connection.sock is not None:
            self._connection.sock.settimeout(left_s)

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()
