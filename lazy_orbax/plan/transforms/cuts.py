"""Cuts parts of an array into boxes that are boxes of the stored leaf, and views of a shard."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from types import EllipsisType

from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.transforms.part import NOWHERE, Digit, Part, joined, within
from lazy_orbax.plan.transforms.scalars import MisfitError

MOST_CUTS = 2**20
"""Most boxes that are read for one part of a shard; more are a reshape that nobody means."""
Index = tuple[slice | EllipsisType, ...]
"""What is indexed with it is a view; of an array without axes as well, which needs `...`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A box of a shard that is a box of a stored leaf.

    Attributes:
        index: where it is in the shard.
        axes: how the axes of that are exchanged.
        shape: its shape in the stored leaf.
        stored_start: where it starts in the stored leaf, after the start of its part.
    """

    index: Index
    axes: tuple[int, ...]
    shape: Shape
    stored_start: Shape


def cuts(part: Part, box: Box) -> tuple[Cut, ...]:
    """Cuts what a shard has of a part.

    Args:
        part: the part.
        box: the shard. It is in C order.

    Raises:
        MisfitError: there would be too many.
    """
    start = tuple(a - b for a, b in zip(part.start, box.start, strict=True))
    return _cuts(part.digits, start, len(part.stored_start), box.shape)


@functools.lru_cache(maxsize=4096)
def _cuts(
    digits: tuple[Digit, ...], start: Shape, stored_ndim: int, shape: Shape
) -> tuple[Cut, ...]:
    """Cuts a part that starts at `start` of a shard; leaves that look alike share the answer."""
    pieces = [Part(start, digits, (0,) * stored_ndim)]
    for axis, n in enumerate(shape):
        pieces = [inside for piece in pieces for inside in within(piece, axis, 0, n)]
    return tuple(cut for piece in pieces for cut in _cuts_inside(piece, shape))


def _cuts_inside(part: Part, shard: Shape) -> list[Cut]:
    """Cuts a part that is inside of a shard."""
    steps = tuple(math.prod(shard[axis + 1 :]) for axis in range(len(shard)))
    kept, single = list(joined(part.digits)), []
    while (bad := _obstacle(kept, steps, len(part.stored_start))) is not None:
        kept.remove(bad)
        single.append(bad)
    if (n_cuts := math.prod(digit.size for digit in single)) > MOST_CUTS:
        raise MisfitError(f"found {n_cuts} boxes of what is stored, wanted at most {MOST_CUTS}")
    shape, stored_shape = [1] * len(shard), [1] * len(part.stored_start)
    for digit in kept:
        shape[digit.axis] *= digit.size
        if digit.stored_axis != NOWHERE:
            stored_shape[digit.stored_axis] *= digit.size
    axes = _axes(kept, len(shard))
    found = []
    for values in itertools.product(*(range(digit.size) for digit in single)):
        start, stored = list(part.start), list(part.stored_start)
        for digit, value in zip(single, values, strict=True):
            start[digit.axis] += value * digit.step
            if digit.stored_axis != NOWHERE:
                stored[digit.stored_axis] += value * digit.stored_step
        index = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        found.append(Cut(index or (...,), axes, tuple(stored_shape), tuple(stored)))
    return found


def _obstacle(digits: Sequence[Digit], steps: Shape, stored_ndim: int) -> Digit | None:
    """Returns a digit of which each value needs a cut of its own, if there is one.

    Args:
        digits: the digits.
        steps: how far one index of each axis leads in the memory of the shard.
        stored_ndim: how many axes the stored leaf has.
    """
    for axis in range(len(steps)):
        own = sorted((d for d in digits if d.axis == axis), key=lambda d: d.step)
        if (bad := _gap(own, [d.step for d in own])) is not None:
            return bad
    order: list[Digit] = []
    for axis in range(stored_ndim):
        own = sorted((d for d in digits if d.stored_axis == axis), key=lambda d: d.stored_step)
        if (bad := _gap(own, [d.stored_step for d in own])) is not None:
            return bad
        order += reversed(own)
    for axis in range(len(steps)):
        places = [i for i, digit in enumerate(order) if digit.axis == axis]
        for i, j in itertools.pairwise(places):
            if j != i + 1 or order[i].step < order[j].step:
                return max(order[i], order[j], key=lambda d: d.step)
    for outer, inner in itertools.pairwise(order):
        if (
            outer.stored_axis == inner.stored_axis
            and outer.axis != inner.axis
            and outer.step * steps[outer.axis] != inner.size * inner.step * steps[inner.axis]
        ):
            return outer
    return None


def _gap(digits: Sequence[Digit], steps: Sequence[int]) -> Digit | None:
    """Returns the first digit that does not go on where the smaller ones end."""
    end = 1
    for digit, step in zip(digits, steps, strict=True):
        if step != end:
            return digit
        end *= digit.size
    return None


def _axes(digits: Sequence[Digit], ndim: int) -> tuple[int, ...]:
    """Returns the axes of an array in the order of those of the stored leaf."""
    order: list[int] = []
    for digit in sorted(digits, key=lambda d: (d.stored_axis, -d.stored_step)):
        if digit.axis not in order:
            order.append(digit.axis)
    if order == sorted(order):
        return tuple(range(ndim))
    return (*(axis for axis in range(ndim) if axis not in order), *order)
