"""A part of an array: the elements that come from one box of one stored leaf, and from where.

Both sides number the elements of a part by the same *digits*, as a clock numbers seconds by hours,
minutes and seconds. Each digit says how far one step of it leads in the array and in the stored
leaf. Transposing and reshaping change where digits lead and cut no box before it must be cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from lazy_orbax.plan.boxes import Box, Shape

NOWHERE = -1
"""The stored axis of what is filled in."""


@dataclasses.dataclass(frozen=True, slots=True)
class Digit:
    """One digit of the number of an element.

    Attributes:
        size: how many values it has, at least two.
        axis: the axis of the array along which it counts.
        step: how many indexes one step of it is, there.
        stored_axis: the axis of the stored leaf along which it counts.
        stored_step: how many indexes one step of it is, there.
    """

    size: int
    axis: int
    step: int
    stored_axis: int
    stored_step: int

    @property
    def span(self) -> int:
        """The index of its last value, in the array."""
        return (self.size - 1) * self.step


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The stored leaf that a part comes from.

    Attributes:
        leaf: its name, as Orbax names it.
        source: the checkpoint that has it; empty where there is one only.
    """

    leaf: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.leaf}" if self.source else self.leaf


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Elements of an array that are alike: from one stored leaf, or filled with one value.

    Each axis of the array is covered by digits of which each steps over all smaller ones, so that
    no element has two numbers.

    Attributes:
        start: the index of the first element, in the array.
        digits: how the other elements follow.
        stored_start: the index of the first element, in the stored leaf.
        origin: the stored leaf, or `None` for what is filled in.
        value: what is filled in.
        factor: what is multiplied, or `None`.
    """

    start: Shape
    digits: tuple[Digit, ...]
    stored_start: Shape = ()
    origin: Origin | None = None
    value: float = 0
    factor: float | None = None

    def on(self, axis: int) -> list[Digit]:
        """Returns the digits of an axis, the largest step first."""
        return sorted((d for d in self.digits if d.axis == axis), key=lambda d: -d.step)


def whole(shape: Shape, origin: Origin) -> Part:
    """Returns the part that is all of a stored leaf."""
    zeros = (0,) * len(shape)
    return Part(zeros, _digits_of(shape), zeros, origin)


@functools.lru_cache(maxsize=4096)
def _digits_of(shape: Shape) -> tuple[Digit, ...]:
    """Returns the digits of a whole array; leaves that look alike share them."""
    return tuple(Digit(n, axis, 1, axis, 1) for axis, n in enumerate(shape) if n > 1)


def filled(box: Box, value: float) -> Part:
    """Returns the part that is a box filled with a value."""
    digits = tuple(Digit(n, axis, 1, NOWHERE, 0) for axis, n in enumerate(box.shape) if n > 1)
    return Part(box.start, digits, value=value)


def moved(start: Shape, axis: int, steps: int) -> Shape:
    """Returns `start`, so many indexes further along an axis."""
    return (*start[:axis], start[axis] + steps, *start[axis + 1 :])


def _resized(digit: Digit, size: int) -> Digit:
    """Returns a digit with another number of values."""
    return Digit(size, digit.axis, digit.step, digit.stored_axis, digit.stored_step)


def narrowed(part: Part, digit: Digit, first: int, end: int) -> Part:
    """Returns the elements for which a digit is in `range(first, end)`."""
    stored = part.stored_start
    if first and digit.stored_axis != NOWHERE:
        stored = moved(stored, digit.stored_axis, first * digit.stored_step)
    kept = (_resized(digit, end - first),) if end - first > 1 else ()
    digits = tuple(other for other in part.digits if other is not digit) + kept
    start = moved(part.start, digit.axis, first * digit.step)
    return Part(start, digits, stored, part.origin, part.value, part.factor)


def within(part: Part, axis: int, first: int, end: int) -> list[Part]:
    """Returns what of a part has an index in `range(first, end)` on an axis, as few parts."""
    return within_digits(part, part.on(axis), part.start[axis], first, end)


def within_digits(part: Part, digits: list[Digit], lowest: int, first: int, end: int) -> list[Part]:
    """Returns what of a part lies in a range, measured by some digits of an axis alone.

    Args:
        part: the part.
        digits: those digits, the largest step first.
        lowest: what they count from.
        first: where the range starts.
        end: where it ends.
    """
    below = sum(digit.span for digit in digits)
    if lowest + below < first or lowest >= end:
        return []
    if lowest >= first and lowest + below < end:
        return [part]
    digit, smaller = digits[0], digits[1:]
    below -= digit.span
    # Values of the digit of which all elements are inside, and of which some may be.
    all_first = max(0, -(-(first - lowest) // digit.step))
    all_end = min(digit.size, (end - 1 - below - lowest) // digit.step + 1)
    some_first = max(0, -(-(first - lowest - below) // digit.step))
    some_end = min(digit.size, -(-(end - lowest) // digit.step))
    if all_first >= all_end:
        all_first = all_end = some_end
    found = []
    for value in range(some_first, some_end):
        if value == all_first:
            found.append(narrowed(part, digit, all_first, all_end))
        elif not all_first <= value < all_end:
            one = narrowed(part, digit, value, value + 1)
            found += within_digits(one, smaller, lowest + value * digit.step, first, end)
    return found


def transposed(part: Part, axes: Sequence[int]) -> Part:
    """Returns a part of the array whose axes are exchanged as NumPy does it."""
    new = {old: axis for axis, old in enumerate(axes)}
    digits = tuple(dataclasses.replace(digit, axis=new[digit.axis]) for digit in part.digits)
    return dataclasses.replace(part, start=tuple(part.start[i] for i in axes), digits=digits)


def with_axis(part: Part, axis: int, index: int) -> Part:
    """Returns the part in an array that has one axis more, at one index of that axis."""
    digits = _renumbered(part.digits, axis, 1)
    start = (*part.start[:axis], index, *part.start[axis:])
    return Part(start, digits, part.stored_start, part.origin, part.value, part.factor)


def without_axis(part: Part, axis: int) -> Part:
    """Returns the part in an array that lacks an axis, along which the part has one index."""
    digits = _renumbered(part.digits, axis, -1)
    start = (*part.start[:axis], *part.start[axis + 1 :])
    return Part(start, digits, part.stored_start, part.origin, part.value, part.factor)


@functools.lru_cache(maxsize=4096)
def _renumbered(digits: tuple[Digit, ...], first: int, by: int) -> tuple[Digit, ...]:
    """Returns digits whose axes from `first` on have other numbers."""
    return tuple(
        dataclasses.replace(digit, axis=digit.axis + by) if digit.axis >= first else digit
        for digit in digits
    )


def merged(part: Part, axis: int, sizes: Sequence[int]) -> Part:
    """Returns the part in an array whose axes of these `sizes`, from `axis` on, became one."""
    last = axis + len(sizes) - 1
    steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    own = tuple(
        dataclasses.replace(digit, axis=axis, step=digit.step * steps[digit.axis - axis])
        for digit in part.digits
        if axis <= digit.axis <= last
    )
    others = tuple(digit for digit in part.digits if not axis <= digit.axis <= last)
    index = sum(i * step for i, step in zip(part.start[axis : last + 1], steps, strict=True))
    start = (*part.start[:axis], index, *part.start[last + 1 :])
    digits = joined(own + _renumbered(others, last + 1, axis - last))
    return dataclasses.replace(part, start=start, digits=digits)


def joined(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    """Returns the same digits, where two that follow each other on both sides became one."""
    found: list[Digit] = []
    for digit in sorted(digits, key=lambda d: (d.axis, d.step)):
        last = found[-1] if found else None
        if (
            last is not None
            and (last.axis, last.stored_axis) == (digit.axis, digit.stored_axis)
            and digit.step == last.step * last.size
            and digit.stored_step == last.stored_step * last.size
        ):
            found[-1] = dataclasses.replace(last, size=last.size * digit.size)
        else:
            found.append(digit)
    return tuple(found)
