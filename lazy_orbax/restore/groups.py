"""Host memory for what is read: slabs, each for some leaves, in which shards lie side by side.

On CPU devices an array takes the memory as it is: a slab lives as long as one of its arrays. So
slabs are small, a large leaf has one of its own, and large subtrees at the top have their own. For
other devices a slab is staging: it is given back when its arrays are on their devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from lazy_orbax.plan.boxes import Box
from lazy_orbax.restore.chunk import Target
from lazy_orbax.restore.memory import aligned, rounded_up
from lazy_orbax.restore.wanted import Wanted, shards_of
from lazy_orbax.trust.ocdbt_nodes import Extent

_SLAB_BYTES = 2**25
LARGE_BYTES = 2**22
"""Such a leaf has a slab of its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A leaf in a slab.

    Attributes:
        wanted: the leaf.
        boxes: what is needed of it.
        first: where in the slab the first box starts.
        step: from one box to the next, in bytes.
    """

    wanted: Wanted
    boxes: tuple[Box, ...]
    first: int
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Leaves that share a slab.

    Attributes:
        members: the leaves.
        n_bytes: size of the slab.
    """

    members: tuple[Member, ...]
    n_bytes: int

    @property
    def stored_bytes(self) -> int:
        """How many bytes its leaves need, in the dtype in which they are stored."""
        return sum(
            len(m.boxes) * math.prod(m.boxes[0].shape) * (m.wanted.form or m.wanted).dtype.itemsize
            for m in self.members
            if m.boxes
        )


def grouped(families: Iterable[Sequence[Wanted]], limit_bytes: int) -> Iterator[Group]:
    """Divides leaves into groups, in their order.

    Args:
        families: the leaves; those of a family come into one group.
        limit_bytes: most bytes of staging: two groups have room, unless a family has more.
    """
    most_bytes = min(_SLAB_BYTES, limit_bytes // 2)
    members: list[Member] = []
    done, subtree = 0, None
    for family in families:
        mine, end = _placed(family, done)
        top, n_bytes = _subtree_of(family[0]), end - done
        apart = (top != subtree and done >= LARGE_BYTES) or n_bytes >= LARGE_BYTES
        if members and (apart or end > most_bytes):
            yield Group(tuple(members), done)
            members = []
            mine, end = _placed(family, 0)
        members += mine
        done, subtree = end, top
    if members:
        yield Group(tuple(members), done)


def in_order(leaves: Iterable[Wanted], values: Mapping[str, Extent | bytes]) -> list[Wanted]:
    """Returns leaves as they lie in the files: no gap in what a group reads is another group's.

    Args:
        leaves: the leaves, each stored as one array.
        values: where chunks lie, see `Contents`.
    """
    subtrees: dict[str, int] = {}

    def place(leaf: Wanted) -> tuple[int, str, int]:
        assert leaf.form is not None
        value = values.get(f"{leaf.name}/{leaf.form.key((0,) * len(leaf.shape))}")
        file, offset = value[:2] if isinstance(value, Extent) else ("", 0)
        return subtrees.setdefault(_subtree_of(leaf), len(subtrees)), file, offset

    return sorted(leaves, key=place)


def _subtree_of(leaf: Wanted) -> str:
    """Returns the name of the subtree at the top that has a leaf; of one at the top, nothing."""
    top, dot, _ = leaf.name.partition(".")
    return top if dot else ""


def _placed(family: Sequence[Wanted], first: int) -> tuple[list[Member], int]:
    """Returns leaves in a slab, from a place on, and where they end."""
    members = []
    for leaf in family:
        boxes = shards_of(leaf.sharding, leaf.shape).boxes
        step = rounded_up(math.prod(boxes[0].shape) * leaf.dtype.itemsize) if boxes else 0
        members.append(Member(leaf, boxes, first, step))
        first += step * len(boxes)
    return members, first


def targets_of(
    group: Group, new_slab: Callable[[int], np.ndarray] = aligned
) -> list[tuple[Target, ...]]:
    """Returns memory for each box of each leaf of a group.

    Args:
        group: the group.
        new_slab: returns so many bytes of memory.
    """
    slab = new_slab(group.n_bytes)
    memory = slab.data
    return [_targets(slab, memory, member) for member in group.members]


def _targets(slab: np.ndarray, memory: memoryview, member: Member) -> tuple[Target, ...]:
    leaf, boxes, first, step = member.wanted, member.boxes, member.first, member.step
    if not boxes:
        return ()
    shape, dtype = boxes[0].shape, leaf.dtype
    n_bytes = math.prod(shape) * dtype.itemsize
    starts = range(first, first + step * len(boxes), step)
    arrays = [np.ndarray(shape, dtype, slab, start) for start in starts]
    if leaf.form is None or dtype != leaf.form.dtype:
        return tuple([Target(array, None) for array in arrays])
    return tuple(
        [
            Target(array, memory[start : start + n_bytes])
            for array, start in zip(arrays, starts, strict=True)
        ]
    )
