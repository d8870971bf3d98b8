"""Reshapes what comes from storage, where boxes stay boxes."""

from __future__ import annotations

import dataclasses
import math

from lazy_orbax.plan.boxes import Shape
from lazy_orbax.plan.transforms.part import (
    Digit,
    Part,
    merged,
    narrowed,
    with_axis,
    within_digits,
    without_axis,
)


class CrossingError(Exception):
    """A reshape would need elements that are no box of the stored leaf."""


def reshaped_part(part: Part, found: Shape, wanted: Shape) -> list[Part]:
    """Returns the parts that a part becomes when its array is reshaped.

    Args:
        part: the part.
        found: the shape of the array.
        wanted: the shape that it gets, of as many elements, which are not none.

    Raises:
        CrossingError: boxes of the stored leaf do not stay boxes.
    """
    parts, i, j = [part], len(found), len(wanted)
    while i or j:
        last_i, last_j, n, m = i, j, 1, 1
        while n != m or (i == last_i and j == last_j):
            if (n <= m and i) or not j:
                i, n = i - 1, n * found[i - 1]
            else:
                j, m = j - 1, m * wanted[j - 1]
        sizes = wanted[j:last_j]
        if found[i:last_i] == sizes:
            continue
        parts = [_with_axes(one, i, found[i:last_i], sizes) for one in parts]
        parts = [new for group in parts for new in group]
    return parts


def _with_axes(part: Part, axis: int, found: Shape, wanted: Shape) -> list[Part]:
    """Returns the parts in an array some of whose axes became others, of as many elements."""
    part = merged(part, axis, found) if found else with_axis(part, axis, 0)
    if not wanted:
        return [without_axis(part, axis)]
    parts = [part]
    for i in range(len(wanted) - 1):
        inner = math.prod(wanted[i + 1 :])
        parts = [new for one in parts for new in _divided(one, axis + i, inner)]
    return parts


def _divided(part: Part, axis: int, inner: int) -> list[Part]:
    """Returns the parts in an array whose axis became two, of which the second has `inner` indexes.

    Args:
        part: the part.
        axis: the axis.
        inner: how many indexes the second of the two has.

    Raises:
        CrossingError: boxes of the stored leaf do not stay boxes.
    """
    first = part.start[axis] % inner
    loose = [digit for digit in part.on(axis) if digit.step % inner]
    span = sum(digit.span for digit in loose)
    if first + span < inner:
        return [_on_two_axes(part, axis, inner)]
    digit, smaller = loose[0], loose[1:]
    if digit.step > inner or inner % digit.step:
        raise CrossingError
    below = span - digit.span
    room = digit.step - first % digit.step
    if below >= room:  # Smaller digits carry into this one: they are cut where they do.
        cuts = ((0, room), (room, below + 1))
        pieces = [p for cut in cuts for p in within_digits(part, smaller, 0, *cut)]
    else:
        pieces = _in_rows(part, digit, first // digit.step, inner // digit.step)
    return [two for piece in pieces for two in _divided(piece, axis, inner)]


def _on_two_axes(part: Part, axis: int, inner: int) -> Part:
    """Returns a part that has no digit which counts along both of two new axes."""
    digits = []
    for digit in part.digits:
        if digit.axis == axis and digit.step % inner == 0:
            digits.append(dataclasses.replace(digit, step=digit.step // inner))
        elif digit.axis >= axis:
            digits.append(dataclasses.replace(digit, axis=digit.axis + 1))
        else:
            digits.append(digit)
    index = part.start[axis]
    start = (*part.start[:axis], index // inner, index % inner, *part.start[axis + 1 :])
    return dataclasses.replace(part, start=start, digits=tuple(digits))


def _in_rows(part: Part, digit: Digit, position: int, row: int) -> list[Part]:
    """Cuts a part where a digit begins new rows.

    Args:
        part: the part.
        digit: the digit.
        position: where in a row the digit begins.
        row: how many values of the digit a row has.
    """
    head = min(digit.size, -position % row)
    rows = (digit.size - head) // row
    tail = head + rows * row
    pieces = [narrowed(part, digit, 0, head)] if head else []
    if rows:
        others = tuple(other for other in part.digits if other is not digit)
        outer = dataclasses.replace(
            digit, size=rows, step=digit.step * row, stored_step=digit.stored_step * row
        )
        two = tuple(d for d in (outer, dataclasses.replace(digit, size=row)) if d.size > 1)
        middle = narrowed(part, digit, head, tail)
        pieces.append(dataclasses.replace(middle, digits=others + two))
    if tail < digit.size:
        pieces.append(narrowed(part, digit, tail, digit.size))
    return pieces
