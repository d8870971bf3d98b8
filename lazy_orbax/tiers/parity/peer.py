"""How a member of a group asks another: a short question, or for bytes. Every wait has an end."""

from __future__ import annotations

import http.client
import secrets
import ssl
import time
from collections.abc import Iterator
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity import proof
from lazy_orbax.tiers.parity.transport import ASK, CHUNK_BYTES, HEAD, READ, Tls, Told, context_of


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
        self._wait_until(end_s)
        self._connection.request("POST", path, request)
        self._wait_until(end_s)
        response = self._connection.getresponse()
        if response.status != 200:
            raise ConnectionError(f"it refused ({response.status})")
        head_bytes, chunk_bytes = HEAD.unpack(self._filled(response, HEAD.size, end_s))
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
