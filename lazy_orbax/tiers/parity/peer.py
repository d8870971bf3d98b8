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
from collections.abc import Iterator, Sequence
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity import proof
from lazy_orbax.tiers.parity.transport import (
    ASK,
    CHUNK_BYTES,
    HEAD,
    READ,
    SPAN_BYTES,
    Tls,
    Told,
    context_of,
)

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
        end_s = time.monotonic() + timeout_s
        [(answer, _)] = self._answer(ASK, told, memoryview(b""), [0], end_s)
        return answer

    def read(
        self, told: Told, n_bytes: int, *, timeout_s: float, room: memoryview | None = None
    ) -> Iterator[tuple[memoryview, int]]:
        """Yields the bytes that are asked for, in chunks, each with its digest.

        All chunks come in the same memory: each is there until the next one is asked for.

        Args:
            told: which bytes.
            n_bytes: how many they are.
            timeout_s: most seconds for all of them.
            room: memory for a chunk; `None` takes new.

        Raises:
            KeeperError: as for `ask`; or what came is not what was sent.
        """
        end_s = time.monotonic() + timeout_s
        room = memoryview(bytearray(min(n_bytes, CHUNK_BYTES))) if room is None else room
        for first in range(0, n_bytes, SPAN_BYTES):
            end = min(first + SPAN_BYTES, n_bytes)
            sizes = [min(CHUNK_BYTES, end - at) for at in range(first, end, CHUNK_BYTES)]
            span = {**told, "first": first, "end": end}
            for answer, chunk in self._answer(READ, span, room, sizes, end_s):
                digest = digest_of_bytes(chunk)
                if answer.get("digest") != digest:
                    raise KeeperError(f"what came from {self.address} is not what was asked for")
                yield chunk, digest

    def _answer(
        self, path: str, told: Told, room: memoryview, sizes: Sequence[int], end_s: float
    ) -> Iterator[tuple[Told, memoryview]]:
        """Yields the parts of an answer: what is said, and the bytes behind it, in `room`."""
        told, is_over = {**told, "once": secrets.token_hex(8)}, False
        request = proof.sealed(self._secret, path.encode(), told)
        code = proof.code_of(request)
        try:
            response = self._response(path, request, end_s)
            for size in sizes:
                head, chunk = _next_part(response, room[:size])
                answer, code = proof.opened(self._secret, code, head), proof.code_of(head)
                if "error" in answer:
                    raise KeeperError(f"{self.address} says: {answer['error']}")
                if len(chunk) != size:
                    raise KeeperError(f"what came from {self.address} is not what was asked for")
                yield answer, chunk
            if response.readinto(bytearray(1)):
                raise ConnectionError("it sends more than was asked for")
            is_over = True
        except proof.NotProvenError as error:
            raise KeeperError(f"{self.address} is no member: {error}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise KeeperError(
                f"{self.address} does not answer as a member: {error or type(error).__name__}"
            ) from error
        finally:
            if not is_over:
                self._connection.close()

    def _response(self, path: str, request: bytes, end_s: float) -> http.client.HTTPResponse:
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
        return response

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


def _next_part(response: http.client.HTTPResponse, room: memoryview) -> tuple[bytes, memoryview]:
    """Returns what comes next: a message, and the chunk behind it."""
    head_bytes, chunk_bytes = HEAD.unpack(_filled(response, bytearray(HEAD.size)))
    if chunk_bytes > len(room):
        raise ConnectionError(f"it sends {chunk_bytes} bytes, wanted {len(room)} at most")
    head = bytes(_filled(response, bytearray(head_bytes)))
    return head, _filled(response, room[:chunk_bytes])


def _filled(response: http.client.HTTPResponse, room: Any) -> Any:
    if len(room) and response.readinto(room) != len(room):
        raise ConnectionError("it hung up")
    return room
