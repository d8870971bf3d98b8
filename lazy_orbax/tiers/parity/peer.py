"""How a member of a group asks another: a short question, or for bytes. Every wait has an end."""

from __future__ import annotations

import errno
import functools
import http.client
import io
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity import proof
from lazy_orbax.tiers.parity.transport import ASK, CHUNK_BYTES, HEAD, READ, Tls, Told, context_of

# A machine that is gone refuses nothing: for so long it may be silent, as its kernel is asked.
_SILENT_S, _CONNECT_S = 20, 20.0


class _InTime(io.RawIOBase):
    """Reads a connection until a moment, however many bytes come from time to time."""

    def __init__(self, connection: socket.socket, end_s: float):
        self._connection, self._end_s = connection, end_s

    def makefile(self, _: str) -> io.BufferedReader:
        """Returns what a response is read from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left_s(self._end_s))
        return self._connection.recv_into(buffer)


def _response(end_s: float, connection: socket.socket, **how: Any) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(_InTime(connection, end_s), **how)  # type: ignore[arg-type]


def _left_s(end_s: float) -> float:
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("it took too long")
    return left_s


def _ask_whether_it_is_there(connection: socket.socket) -> None:
    """Has the kernel ask the other one, who may be long in its answer but never in that.

    Else an exchange would wait to its end for a machine whose power is cut, or whose link is.
    """
    every_s = max(1, _SILENT_S // 4)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
    # Of what was sent and is not acknowledged, too; and in place of a number of questions.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_S * 1000)


class Peer:
    """Another member, or whoever is at its address."""

    def __init__(self, address: str, secret: str, tls: Tls | None):
        """Connects when it is asked something.

        Raises:
            KeeperError: the certificates cannot be used.
        """
        self._secret, self.address = secret, address
        context = context_of(tls, ssl.PROTOCOL_TLS_CLIENT)
        if context is None:
            self._connection = http.client.HTTPConnection(address)
        else:
            self._connection = http.client.HTTPSConnection(address, context=context)

    def ask(self, told: Told, *, timeout_s: float) -> Told:
        """Returns the answer to a question.

        Raises:
            KeeperError: it refused, does not know the secret, or did not answer in time.
        """
        return self._asked(ASK, told, 0, time.monotonic() + timeout_s)[0]

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
            answer, chunk = self._asked(READ, more, end - first, end_s)
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
        connection = self._connection
        if connection.sock is None:
            self._connect(end_s)
        assert connection.sock is not None
        connection.sock.settimeout(_left_s(end_s))
        connection.response_class = functools.partial(_response, end_s)  # type: ignore[assignment]
        connection.request("POST", path, request)
        response = connection.getresponse()
        if response.status != 200:
            raise ConnectionError(f"it refused ({response.status})")
        head_bytes, chunk_bytes = HEAD.unpack(_filled(response, HEAD.size))
        if chunk_bytes > most:
            raise ConnectionError(f"it sends {chunk_bytes} bytes, wanted {most} at most")
        head, chunk = bytes(_filled(response, head_bytes)), _filled(response, chunk_bytes)
        response.read(0)
        return head, chunk

    def _connect(self, end_s: float) -> None:
        connection = self._connection
        for is_second in (False, True):
            connection.timeout = min(_left_s(end_s), _CONNECT_S)
            try:
                connection.connect()
                break
            except OSError as error:
                # The kernel may have looked for it since before the network healed.
                if is_second or error.errno != errno.EHOSTUNREACH:
                    raise
        _ask_whether_it_is_there(connection.sock)

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()


def _filled(response: http.client.HTTPResponse, n_bytes: int) -> memoryview:
    content, n = memoryview(bytearray(n_bytes)), 0
    while n < n_bytes:
        n += (more := response.readinto(content[n:]))
        if not more:
            raise ConnectionError("it hung up")
    return content
