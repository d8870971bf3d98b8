"""Something that needs bytes of several members, and has to end in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity.peer import Peer
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.parity.transport import CHUNK_BYTES


class Errand:
    """Asks members, one after the other, until its time is over."""

    def __init__(self, settings: NodeSettings):
        """Begins now.

        Args:
            settings: how to speak to members, and for how long.
        """
        self._settings = settings
        self._end_s = time.monotonic() + settings.timeout_s
        self._peers: dict[str, Peer] = {}
        # The first touch of new memory takes longer than to fill it again.
        self._room = memoryview(bytearray(CHUNK_BYTES))

    def _peer(self, address: str) -> Peer:
        if address not in self._peers:
            self._peers[address] = Peer(address, self._settings.secret, self._settings.tls)
        return self._peers[address]

    def _left_s(self) -> float:
        return max(0.1, self._end_s - time.monotonic())

    def ask(self, address: str, told: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Returns the answer to a question.

        Raises:
            KeeperError: there is none.
        """
        return self._peer(address).ask(told, timeout_s=min(timeout_s, self._left_s()))

    def pull(self, address: str, told: dict[str, Any], n_bytes: int) -> Incoming:
        """Returns bytes on their way here. One has come whole before another is asked for.

        Args:
            address: whom to ask.
            told: which bytes.
            n_bytes: how many they are.
        """
        peer, left_s = self._peer(address), self._left_s()
        chunks = peer.read(told, n_bytes, timeout_s=left_s, room=self._room)
        return Incoming(chunks)

    def __enter__(self) -> Errand:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers.values():
            peer.close()


class Incoming:
    """Bytes that come from a member.

    Attributes:
        digest: of all of them, when they have come: that of the digests of their chunks.
    """

    def __init__(self, chunks: Iterator[tuple[memoryview, int]]):
        self._chunks, self.digest = chunks, 0

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        digests, at = list[int](), 0
        for chunk, digest in self._chunks:
            digests.append(digest)
            yield at, chunk
            at += len(chunk)
        self.digest = _digest_of(digests)


def digest_in_chunks(content: np.ndarray) -> int:
    """Returns the digest that bytes have when they come in chunks."""
    chunks = range(0, content.size, CHUNK_BYTES)
    return _digest_of([digest_of_bytes(content[at : at + CHUNK_BYTES]) for at in chunks])


def _digest_of(digests: list[int]) -> int:
    return digest_of_bytes(np.array(digests, "<u8"))
