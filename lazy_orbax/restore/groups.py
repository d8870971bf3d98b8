"""Host memory for what is read: slabs, each for some leaves, in which shards lie side by side.

On CPU devices an array takes the memory as it is: a slab lives as long as one of its arrays. So
slabs are small, a large leaf has one of its own, and large subtrees at the top have their own. For
other devices a slab is staging: it is given back when its arrays are on their devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from lazy_orbax.plan.boxes import Box
from lazy_orbax.restore.reader import Target, aligned, rounded_up
from lazy_orbax.restore.wanted import Wanted, shards_of

_SLAB_BYTES = 2**24
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
        """How many bytes of what is stored its leaves need."""
        return sum(
            len(m.boxes) * math.prod(m.boxes[0].shape) * m.wanted.form.dtype.itemsize
            for m in self.members
            if m.boxes
        )


def grouped(wanted: Sequence[Wanted]) -> Iterator[Group]:
    """Divides leaves into groups, in their order."""
    members: list[Member] = []
    done, subtree = 0, None
    for leaf in wanted:
        boxes = shards_of(leaf.sharding, leaf.form.shape).boxes
        step = rounded_up(math.prod(boxes[0].shape) * leaf.dtype.itemsize) if boxes else 0
        n_bytes, mine = step * len(boxes), leaf.name.partition(".")[0]
        apart = (mine != subtree and done >= LARGE_BYTES) or n_bytes >= LARGE_BYTES
        if members and (apart or done + n_bytes > _SLAB_BYTES):
            yield Group(tuple(members), done)
            members, done = [], 0
        members.append(Member(leaf, boxes, done, step))
        done, subtree = done + n_bytes, mine
    if members:
        yield Group(tuple(members), done)


def targets_of(group: Group) -> list[tuple[Target, ...]]:
    """Returns memory for each box of each leaf of a group."""
    slab = aligned(group.n_bytes)
    memory = memoryview(slab)
    found = []
    for member in group.members:
        leaf, targets, start = member.wanted, [], member.first
        is_same = leaf.dtype == leaf.form.dtype
        for box in member.boxes:
            stop = start + math.prod(box.shape) * leaf.dtype.itemsize
            array = slab[start:stop].view(leaf.dtype).reshape(box.shape)
            targets.append(Target(array, memory[start:stop] if is_same else None))
            start += member.step
        found.append(tuple(targets))
    return found
