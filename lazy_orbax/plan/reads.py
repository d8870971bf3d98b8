"""What of which stored chunk goes where, for the boxes that are wanted of an array. Pure.

An array is stored in chunks, each a value of its own: a range of bytes in a file. What is wanted of
it, one shard for example, is a box. A chunk is read once, however many boxes want some of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lazy_orbax.plan.boxes import Box, Shape, parts

Index = tuple[slice, ...]


class Placed(NamedTuple):
    """A part of a chunk, and where it goes.

    Attributes:
        wanted: which of the wanted boxes it is in.
        source: the part, as an index into the chunk.
        target: the same, as an index into that box.
    """

    wanted: int
    source: Index
    target: Index


class Span(NamedTuple):
    """Some bytes of a chunk that go where they belong as they are.

    Attributes:
        wanted: to which of the wanted boxes.
        offset: where they go, in bytes from the start of that box.
        n_bytes: how many.
    """

    wanted: int
    offset: int
    n_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ChunkRead:
    """A chunk, and what is to be done with it. Leaves that look alike share it.

    Attributes:
        position: its place in the grid of chunks.
        box: what of the array is in it: at the end of an axis, less than a chunk.
        placed: the parts of it that are wanted.
        spans: all of its bytes, in their order, where each goes to one place as it is; else none.
    """

    position: Shape
    box: Box
    placed: tuple[Placed, ...]
    spans: tuple[Span, ...]


@functools.lru_cache(maxsize=4096)
def chunk_reads(
    shape: Shape, chunk: Shape, itemsize: int, boxes: tuple[Box, ...]
) -> tuple[ChunkRead, ...]:
    """Returns every chunk of which something is wanted, in C order.

    Args:
        shape: of the array.
        chunk: shape of its chunks.
        itemsize: bytes of one element.
        boxes: what is wanted of it, each with at least one element. They may overlap.
    """
    wanting: dict[Shape, list[int]] = {}
    for i, box in enumerate(boxes):
        for position in _positions(box, chunk):
            wanting.setdefault(position, []).append(i)
    return tuple(
        _read_of(position, shape, chunk, itemsize, [(i, boxes[i]) for i in who])
        for position, who in sorted(wanting.items())
    )


def _positions(box: Box, chunk: Shape) -> Iterator[Shape]:
    sides = zip(box.start, box.shape, chunk, strict=True)
    return itertools.product(*(range(a // c, (a + n - 1) // c + 1) for a, n, c in sides))


def _read_of(
    position: Shape, shape: Shape, chunk: Shape, itemsize: int, wanting: list[tuple[int, Box]]
) -> ChunkRead:
    start = tuple(i * c for i, c in zip(position, chunk, strict=True))
    extent = tuple(min(c, n - a) for a, c, n in zip(start, chunk, shape, strict=True))
    mine = Box(start, extent)
    placed = []
    for i, box in wanting:
        common = mine.overlap(box)
        assert common is not None
        placed.append(Placed(i, common.relative_to(mine), common.relative_to(box)))
    spans = _spans(mine, placed, [box for _, box in wanting], itemsize) if extent == chunk else ()
    return ChunkRead(position, mine, tuple(placed), spans)


def _spans(
    chunk: Box, placed: Sequence[Placed], boxes: Sequence[Box], itemsize: int
) -> tuple[Span, ...]:
    """Returns where the bytes of a chunk go as they are; nothing, if some do not, or to two places.

    Args:
        chunk: the chunk, all of which is of the array.
        placed: what of it is wanted.
        boxes: the box that wants it, for each of these.
        itemsize: bytes of one element.
    """
    found = []
    for one, box in zip(placed, boxes, strict=True):
        shape = _shape_of(one.source)
        first = _offset(one.source, shape, chunk.shape, itemsize)
        offset = _offset(one.target, shape, box.shape, itemsize)
        if first is None or offset is None:
            return ()
        found.append((first, Span(one.wanted, offset, math.prod(shape) * itemsize)))
    found.sort()
    end = 0
    for first, span in found:
        if first != end:
            return ()
        end += span.n_bytes
    return tuple(span for _, span in found) if end == math.prod(chunk.shape) * itemsize else ()


def _offset(part: Index, shape: Shape, whole: Shape, itemsize: int) -> int | None:
    """Returns where a part of an array starts in its memory, if it is in one piece there."""
    axis = 0
    while axis < len(shape) and shape[axis] == 1:
        axis += 1
    if shape[axis + 1 :] != whole[axis + 1 :]:
        return None
    elements = 0
    for index, n in zip(part, whole, strict=True):
        elements = elements * n + index.start
    return elements * itemsize


class Run(NamedTuple):
    """Values that are read at once.

    Attributes:
        start: the first byte.
        stop: the byte after the last.
        members: positions of the values in what was given, by their place in the file.
    """

    start: int
    stop: int
    members: tuple[int, ...]


def coalesced(
    extents: Sequence[tuple[int, int]], *, gap_bytes: int, most_bytes: int, most_members: int
) -> Iterator[Run]:
    """Joins neighbours in a file.

    Args:
        extents: offset and length of each value in the file, in any order.
        gap_bytes: so much between two of them is read as well, and thrown away.
        most_bytes: no run is longer, unless one value is.
        most_members: no run has more values.

    Raises:
        ValueError: two overlap. The message is their positions in the file.
    """
    members: list[int] = []
    start = stop = 0
    for i in sorted(range(len(extents)), key=extents.__getitem__):
        offset, length = extents[i]
        if members and offset < stop:
            raise ValueError(f"bytes {offset} to {offset + length}, and others that end at {stop}")
        if members and (
            offset - stop > gap_bytes
            or offset + length - start > most_bytes
            or len(members) == most_members
        ):
            yield Run(start, stop, tuple(members))
            members = []
        if not members:
            start = offset
        members.append(i)
        stop = offset + length
    if members:
        yield Run(start, stop, tuple(members))


class Rows(NamedTuple):
    """Some rows of a chunk, which follow each other in its bytes.

    Attributes:
        box: the rows, in the chunk's own coordinates.
        kept: those of them that are of the array, as an index into the rows; `None`: none is.
        placed: the parts of the rows that are wanted.
    """

    box: Box
    kept: Index | None
    placed: tuple[Placed, ...]


@functools.lru_cache(maxsize=256)
def rows_of(read: ChunkRead, chunk: Shape, itemsize: int, limit_bytes: int) -> tuple[Rows, ...]:
    """Cuts a chunk in rows, for one that is not to be held as a whole.

    Args:
        read: the chunk.
        chunk: its shape as it is stored.
        itemsize: bytes of one element.
        limit_bytes: most bytes of some rows.
    """
    inside = Box((0,) * len(chunk), read.box.shape)
    wholes = [
        (one, Box(tuple(s.start for s in one.source), _shape_of(one.source))) for one in read.placed
    ]
    found = []
    for box in parts(chunk, itemsize, limit_bytes):
        placed = []
        for one, whole in wholes:
            if (common := box.overlap(whole)) is not None:
                shifts = [t.start - s.start for s, t in zip(one.source, one.target, strict=True)]
                start = tuple(a + b for a, b in zip(common.start, shifts, strict=True))
                target = Box(start, common.shape).index
                placed.append(Placed(one.wanted, common.relative_to(box), target))
        kept = box.overlap(inside)
        found.append(Rows(box, kept.relative_to(box) if kept else None, tuple(placed)))
    return tuple(found)


def _shape_of(index: Index) -> Shape:
    return tuple(part.stop - part.start for part in index)
