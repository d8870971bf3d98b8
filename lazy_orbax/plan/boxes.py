"""Rectangles of a leaf: as an index, what two have in common, and in parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

Shape = tuple[int, ...]


def index_of(start: Shape, shape: Shape, origin: Shape | None = None) -> tuple[slice, ...]:
    """Returns a rectangle as an index.

    Args:
        start: where it starts in the global array.
        shape: its shape.
        origin: where that starts which is indexed; `None` is the global array itself.
    """
    if origin is not None:
        start = tuple(a - b for a, b in zip(start, origin, strict=True))
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a leaf.

    Attributes:
        start: where it starts in the global array.
        shape: its shape.
    """

    start: Shape
    shape: Shape

    @property
    def index(self) -> tuple[slice, ...]:
        """The rectangle as an index into the global array."""
        return index_of(self.start, self.shape)

    def overlap(self, other: Box) -> Box | None:
        """Returns what two rectangles have in common, if that is anything."""
        if len(self.start) != len(other.start):
            return None
        start, shape = [], []
        for i, n, j, m in zip(self.start, self.shape, other.start, other.shape, strict=True):
            first, end = max(i, j), min(i + n, j + m)
            if first >= end:  # Of many boxes most end here: there is nothing else to look at.
                return None
            start.append(first)
            shape.append(end - first)
        return Box(tuple(start), tuple(shape))

    def is_within(self, whole: Box) -> bool:
        """Whether nothing of it is outside of `whole`."""
        return self == whole or self.overlap(whole) == self

    def relative_to(self, whole: Box) -> tuple[slice, ...]:
        """The rectangle as an index into what `whole` is."""
        return index_of(self.start, self.shape, whole.start)

    def __str__(self) -> str:
        return f"[{', '.join(f'{part.start}:{part.stop}' for part in self.index)}]"


def parts(
    shape: Shape, itemsize: int, limit_bytes: int, chunk: Shape | None = None
) -> Iterator[Box]:
    """Cuts an array into boxes of at most `limit_bytes` that follow each other in C order.

    Args:
        shape: the array's shape.
        itemsize: bytes of one element.
        limit_bytes: most bytes of a box, unless one element has more.
        chunk: shape of the chunks in which it is stored. Boxes are cut between chunks, where rows
            of whole chunks do not take more than four times the limit.
    """
    if not shape:
        yield Box((), ())
        return
    axis, n_together = 0, 1
    if chunk and math.prod(shape[1:]) * itemsize * chunk[0] <= 4 * limit_bytes:
        n_together = chunk[0]
    else:
        while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) * itemsize > limit_bytes:
            axis += 1
    row_bytes = max(1, math.prod(shape[axis + 1 :]) * itemsize)
    rows = max(1, limit_bytes // row_bytes // n_together) * n_together
    for outer in np.ndindex(*shape[:axis]):
        for row in range(0, shape[axis], rows):
            start = (*outer, row, *(0 for _ in shape[axis + 1 :]))
            n_rows = min(rows, shape[axis] - row)
            yield Box(start, (*(1 for _ in outer), n_rows, *shape[axis + 1 :]))
