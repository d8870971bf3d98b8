"""What was read becomes arrays, and staging memory is given back."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax.parts_in_memory import array_of
from lazy_orbax._orbax.restored_kinds import ARRAY, NUMPY
from lazy_orbax.integrity.proof_subjects import is_in_host_memory
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.restore.chunk import Target
from lazy_orbax.restore.groups import LARGE_BYTES, Group
from lazy_orbax.restore.wanted import Wanted, shards_of


class Staging:
    """Groups that are being read, and what became of those that are.

    Invariant: the groups in `_reading` have `_n_bytes` bytes of memory; those of other devices than
    the host's have no more than the limit at once, unless one alone has more.

    Attributes:
        values: what was read, by position in the target.
        wrong: the pieces that are not what was saved.
    """

    def __init__(self, limit_bytes: int, arrived: Callable[[int], None]):
        """Begins with nothing.

        Args:
            limit_bytes: most bytes of staging memory.
            arrived: is told how many of the wanted bytes have come.
        """
        self._arrived, self._done_bytes = arrived, 0
        self.values: dict[int, Any] = {}
        self.wrong: list[Piece] = []
        self._limit_bytes, self._n_bytes = limit_bytes, 0
        self._reading: collections.deque[tuple[Group, Any, Sequence[Any]]] = collections.deque()

    def reserve(self, group: Group) -> None:
        """Waits until there is room for a group."""
        if all(takes_host_memory(member.wanted) for member in group.members):
            return
        while self._reading and self._n_bytes + group.n_bytes > self._limit_bytes:
            self._take(blocks=True)

    def add(self, group: Group, targets: list[tuple[Target, ...]], futures: Sequence[Any]) -> None:
        """Notes a group that is being read.

        Args:
            group: the group.
            targets: its memory.
            futures: of lists of pieces that are not what was saved, in the order in which they
                are asked.
        """
        self._reading.append((group, targets, futures))
        self._n_bytes += group.n_bytes

    def finish(self) -> None:
        """Waits for everything."""
        while self._reading:
            self._take(blocks=False)

    def _take(self, *, blocks: bool) -> None:
        group, targets, futures = self._reading.popleft()
        for future in futures:
            self.wrong += future.result()
        made = [
            _made(member.wanted, mine) for member, mine in zip(group.members, targets, strict=True)
        ]
        if blocks:  # Here the staging memory ends: its arrays must be on their devices.
            jax.block_until_ready([one for one in made if isinstance(one, jax.Array)])
        self._n_bytes -= group.n_bytes
        self._done_bytes += group.stored_bytes
        self._arrived(self._done_bytes)
        for member, one in zip(group.members, made, strict=True):
            self.values[member.wanted.position] = one


def _made(leaf: Wanted, targets: tuple[Target, ...]) -> Any:
    """Returns a leaf, of the memory in which its boxes are."""
    if leaf.kind == ARRAY:
        boxes = [target.array for target in targets]
        if not boxes:
            boxes = [np.empty(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)]
        of_devices = shards_of(leaf.sharding, leaf.shape).of_devices
        parts = [boxes[i] for i in of_devices]
        return array_of(leaf.shape, leaf.dtype, leaf.sharding, parts)
    if leaf.kind == NUMPY:
        array = targets[0].array if targets else np.empty(leaf.shape, leaf.dtype)
        return array if array.nbytes >= LARGE_BYTES else array.copy()  # It lets go of the slab.
    number = targets[0].array.item()
    return leaf.restore_type(number) if leaf.restore_type else number


def takes_host_memory(leaf: Wanted) -> bool:
    """Whether a leaf stays in the memory in which it was read."""
    return leaf.sharding is None or is_in_host_memory(leaf.sharding)
