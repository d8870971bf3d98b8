"""Which boxes of which leaves are merged together, so that each stored chunk is read once. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.runs import runs
from lazy_orbax.restore.memory import rounded_up

_UNIT_BYTES = 2**24
_MOST_PARTS = 256


@dataclasses.dataclass(frozen=True)
class Cut:
    """What the plan needs to know of a leaf.

    Attributes:
        shape: of the array.
        chunk: shape of its chunks in the result.
        chunks: the same in each source.
        itemsizes: bytes of an element in each region of memory that a box of it needs.
    """

    shape: Shape
    chunk: Shape
    chunks: tuple[Shape, ...]
    itemsizes: tuple[int, ...]


class Part(NamedTuple):
    """A box of a leaf: whole chunks of the result, up to the ends of the array.

    Attributes:
        leaf: its position.
        box: the box.
        regions: bytes of each region of memory that it needs.
    """

    leaf: int
    box: Box
    regions: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Of memory."""
        return sum(map(rounded_up, self.regions))


class Unit(NamedTuple):
    """Boxes that are read, merged and written together.

    Attributes:
        parts: the boxes.
        n_bytes: of memory that they need.
    """

    parts: tuple[Part, ...]
    n_bytes: int


def units_of(cuts: Sequence[tuple[int, Cut]], limit_bytes: int) -> Iterator[Unit]:
    """Divides leaves into units, in their order.

    Args:
        cuts: leaves, each with its position.
        limit_bytes: most memory of a unit, unless one chunk of the result alone needs more.
    """
    most_bytes = min(_UNIT_BYTES, limit_bytes)
    parts = (part for leaf, cut in cuts for part in _parts_of(leaf, cut, limit_bytes))
    for run in runs(parts, lambda part: part.n_bytes, most_bytes, _MOST_PARTS):
        yield Unit(tuple(run), sum(part.n_bytes for part in run))


def regions_in(unit: Unit) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yields, for each part, where its regions start and end in the memory of the unit."""
    first = 0
    for part in unit.parts:
        found = []
        for n_bytes in part.regions:
            found.append((first, first + n_bytes))
            first += rounded_up(n_bytes)
        yield tuple(found)


def share_of(units: Sequence[Unit], process: int, processes: int) -> list[Unit]:
    """Returns the units of one process: all have about as many bytes.

    Args:
        units: of all.
        process: which process.
        processes: how many there are.
    """
    loads, mine = [0] * processes, []
    for unit in units:
        whose = loads.index(min(loads))
        loads[whose] += unit.n_bytes
        if whose == process:
            mine.append(unit)
    return mine


def chunks_in(box: Box, shape: Shape, chunk: Shape) -> Iterator[Box]:
    """Yields the chunks in a box that consists of whole ones."""
    for start in itertools.product(
        *(range(a, a + n, c) for a, n, c in zip(box.start, box.shape, chunk, strict=True))
    ):
        yield Box(start, tuple(min(c, n - a) for a, c, n in zip(start, chunk, shape, strict=True)))


def _parts_of(leaf: int, cut: Cut, limit_bytes: int) -> Iterator[Part]:
    if 0 in cut.shape:
        return
    whole = Box((0,) * len(cut.shape), cut.shape)
    for box in chunks_in(whole, cut.shape, _grid(cut, limit_bytes)):
        elements = math.prod(box.shape)
        yield Part(leaf, box, tuple(elements * itemsize for itemsize in cut.itemsizes))


def _grid(cut: Cut, limit_bytes: int) -> Shape:
    """Returns the shape of boxes that no chunk of a source lies across, if they are not too large.

    Where they would be, they are chunks of the result, and of a source that is cut otherwise some
    chunks are read more than once.
    """
    common = []
    for n, mine, *theirs in zip(cut.shape, cut.chunk, *cut.chunks, strict=True):
        together = math.lcm(mine, *theirs)
        common.append(min(together, -(-n // mine) * mine))
    n_bytes = math.prod(min(a, b) for a, b in zip(common, cut.shape)) * sum(cut.itemsizes)
    return tuple(common) if n_bytes <= limit_bytes else cut.chunk
