"""An array that is made of boxes of stored leaves: NumPy's operations on it move no element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.transforms.cuts import cuts
from lazy_orbax.plan.transforms.part import (
    Origin,
    Part,
    filled,
    moved,
    transposed,
    whole,
    with_axis,
    within,
    without_axis,
)
from lazy_orbax.plan.transforms.reshape import CrossingError, reshaped_part
from lazy_orbax.plan.transforms.scalars import MisfitError, is_float, scalar
from lazy_orbax.plan.transforms.takes import Fill, Take


@dataclasses.dataclass(frozen=True, slots=True)
class VirtualArray:
    """An array whose elements are still in storage.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        parts: where its elements come from; they cover each element once.
        is_cast: whether a rule gave it its dtype.
    """

    shape: Shape
    dtype: Any
    parts: tuple[Part, ...]
    is_cast: bool = False

    def takes(self, box: Box) -> tuple[Take | Fill, ...]:
        """Returns what makes a box of the array.

        Args:
            box: the box, which is the shard; it is inside of the array.

        Raises:
            MisfitError: it would be made of too many boxes of what is stored.
        """
        found: list[Take | Fill] = []
        for part in self.parts:
            for cut in cuts(part, box) if 0 not in box.shape else ():
                if part.origin is None:
                    found.append(Fill(cut.index, self._filled(part)))
                    continue
                start = tuple(map(sum, zip(part.stored_start, cut.stored_start, strict=True)))
                stored = Box(start, cut.shape)
                leaf, source = part.origin.leaf, part.origin.source
                found.append(
                    Take(leaf, stored, cut.index, cut.axes, cut.shape, part.factor, source)
                )
        return tuple(found)

    def _filled(self, part: Part) -> Any:
        """Returns the value of a part that is filled in, as the last rules leave it."""
        value = np.asarray(part.value).astype(self.dtype)
        if part.factor is not None:
            value = np.multiply(value, part.factor).astype(self.dtype)
        return value[()]


def stored_array(shape: Shape, dtype: Any, origin: Origin) -> VirtualArray:
    """Returns the array that is a stored leaf."""
    return VirtualArray(shape, dtype, (whole(shape, origin),) if math.prod(shape) else ())


def constant(shape: Shape, dtype: Any, value: Any) -> VirtualArray:
    """Returns the array that has one value everywhere.

    Raises:
        MisfitError: the dtype has no such value.
    """
    parts = (filled(Box((0,) * len(shape), shape), scalar(value, dtype)),)
    return VirtualArray(shape, dtype, parts if math.prod(shape) else ())


def _axis(axis: int, ndim: int) -> int:
    """Returns an axis as a number from zero on."""
    if not -ndim <= axis < ndim:
        raise MisfitError(f"axis {axis} is not one of {ndim}")
    return axis % ndim


def _given(array: VirtualArray, shape: Sequence[int | None]) -> Shape:
    """Returns a shape in which `None` stands for what the array has."""
    if len(shape) != len(array.shape):
        raise MisfitError(f"found {len(array.shape)} axes, wanted {len(shape)}")
    return tuple(n if m is None else m for n, m in zip(array.shape, shape, strict=True))


def _alike(arrays: Sequence[VirtualArray], skipped: int | None = None) -> None:
    """Refuses arrays that differ in dtype or, beside one axis, in shape."""
    seen = {}
    for array in arrays:
        shape = tuple("*" if axis == skipped else n for axis, n in enumerate(array.shape))
        seen[f"{array.dtype}[{', '.join(map(str, shape))}]"] = shape
    if len(seen) > 1:
        raise MisfitError(f"found {' and '.join(seen)}, wanted all alike")


def stacked(arrays: Sequence[VirtualArray], axis: int) -> VirtualArray:
    """Returns `np.stack` of arrays that are alike.

    Raises:
        MisfitError: they are not, or there is no such axis.
    """
    _alike(arrays)
    shape = arrays[0].shape
    axis = _axis(axis, len(shape) + 1)
    parts = [with_axis(part, axis, i) for i, array in enumerate(arrays) for part in array.parts]
    shape = (*shape[:axis], len(arrays), *shape[axis:])
    return dataclasses.replace(arrays[0], shape=shape, parts=tuple(parts))


def unstacked(array: VirtualArray, axis: int) -> list[VirtualArray]:
    """Returns the arrays that an array is a stack of.

    Raises:
        MisfitError: there is no such axis.
    """
    axis = _axis(axis, len(array.shape))
    shape = (*array.shape[:axis], *array.shape[axis + 1 :])
    found = []
    for i in range(array.shape[axis]):
        layer = [one for part in array.parts for one in within(part, axis, i, i + 1)]
        parts = tuple(without_axis(part, axis) for part in layer)
        found.append(dataclasses.replace(array, shape=shape, parts=parts))
    return found


def fused(arrays: Sequence[VirtualArray], axis: int) -> VirtualArray:
    """Returns `np.concatenate` of arrays that are alike beside one axis.

    Raises:
        MisfitError: they are not, or there is no such axis.
    """
    axis = _axis(axis, len(arrays[0].shape))
    _alike(arrays, axis)
    parts, end = [], 0
    for array in arrays:
        shifted = (moved(part.start, axis, end) for part in array.parts)
        parts += [
            dataclasses.replace(part, start=start)
            for part, start in zip(array.parts, shifted, strict=True)
        ]
        end += array.shape[axis]
    shape = (*arrays[0].shape[:axis], end, *arrays[0].shape[axis + 1 :])
    return dataclasses.replace(arrays[0], shape=shape, parts=tuple(parts))


def section(array: VirtualArray, axis: int, first: int, end: int) -> VirtualArray:
    """Returns what an array has in `range(first, end)` of an axis."""
    inside = [one for part in array.parts for one in within(part, axis, first, end)]
    parts = tuple(dataclasses.replace(p, start=moved(p.start, axis, -first)) for p in inside)
    shape = (*array.shape[:axis], end - first, *array.shape[axis + 1 :])
    return dataclasses.replace(array, shape=shape, parts=parts)


def split(array: VirtualArray, axis: int, sizes: Sequence[int]) -> list[VirtualArray]:
    """Returns sections of an array that follow each other, of the sizes that are given.

    Raises:
        MisfitError: the sizes do not add up, or there is no such axis.
    """
    axis = _axis(axis, len(array.shape))
    if sum(sizes) != array.shape[axis] or min(sizes, default=0) < 0:
        raise MisfitError(f"found {array.shape[axis]} indexes on axis {axis}, wanted {sum(sizes)}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [section(array, axis, end - n, end) for n, end in zip(sizes, ends, strict=True)]


def padded(array: VirtualArray, shape: Sequence[int | None], value: Any) -> VirtualArray:
    """Returns the array with a value behind the end of each axis.

    Raises:
        MisfitError: the shape is smaller, or the dtype has no such value.
    """
    wanted = _given(array, shape)
    if any(n > m for n, m in zip(array.shape, wanted, strict=True)):
        raise MisfitError(f"found {list(array.shape)}, wanted at most {list(wanted)}")
    value = scalar(value, array.dtype)
    parts = list(array.parts)
    for axis, (n, m) in enumerate(zip(array.shape, wanted, strict=True)):
        rest = (*wanted[:axis], m - n, *array.shape[axis + 1 :])
        start = tuple(n if i == axis else 0 for i in range(len(wanted)))
        if math.prod(rest):
            parts.append(filled(Box(start, rest), value))
    return dataclasses.replace(array, shape=wanted, parts=tuple(parts))


def stripped(array: VirtualArray, shape: Sequence[int | None]) -> VirtualArray:
    """Returns the array without what each axis has behind these sizes.

    Raises:
        MisfitError: the shape is larger.
    """
    wanted = _given(array, shape)
    if any(n < m for n, m in zip(array.shape, wanted, strict=True)):
        raise MisfitError(f"found {list(array.shape)}, wanted at least {list(wanted)}")
    for axis, n in enumerate(wanted):
        array = section(array, axis, 0, n)
    return array


def permuted(array: VirtualArray, axes: Sequence[int] | None) -> VirtualArray:
    """Returns `np.transpose` of an array.

    Raises:
        MisfitError: `axes` is no permutation of its axes.
    """
    ndim = len(array.shape)
    order = tuple(range(ndim))[::-1] if axes is None else tuple(_axis(i, ndim) for i in axes)
    if sorted(order) != list(range(ndim)):
        raise MisfitError(f"found {ndim} axes, wanted each of them once in {list(axes or ())}")
    parts = tuple(transposed(part, order) for part in array.parts)
    return dataclasses.replace(array, shape=tuple(array.shape[i] for i in order), parts=parts)


def reshaped(array: VirtualArray, shape: Sequence[int]) -> VirtualArray:
    """Returns `np.reshape` of an array, where boxes of what is stored stay boxes.

    Raises:
        MisfitError: the shape has another number of elements, or they do not stay boxes.
    """
    wanted = _resolved(array.shape, shape)
    if 0 in wanted:
        return dataclasses.replace(array, shape=wanted)
    try:
        parts = tuple(new for p in array.parts for new in reshaped_part(p, array.shape, wanted))
    except CrossingError:
        raise MisfitError(
            f"found {list(array.shape)}, wanted {list(wanted)}, of which no box is a box of what "
            "is stored: only axes beside each other can be merged or split"
        ) from None
    return dataclasses.replace(array, shape=wanted, parts=parts)


def _resolved(found: Shape, shape: Sequence[int]) -> Shape:
    """Returns a shape in which at most one -1 stands for what is left."""
    known = math.prod(n for n in shape if n != -1)
    left = math.prod(found) // known if known else 0
    wanted = tuple(left if n == -1 else n for n in shape)
    if math.prod(wanted) != math.prod(found) or min(wanted, default=0) < 0:
        raise MisfitError(f"found {list(found)}, wanted as many elements as {list(shape)} has")
    return wanted


def cast(array: VirtualArray, dtype: Any) -> VirtualArray:
    """Returns an array of another dtype. The reader casts once, from what is stored.

    Raises:
        MisfitError: it was cast before, so that it would have to be rounded twice; or it is scaled,
            and there are no fractions of such numbers.
    """
    if array.is_cast:
        raise MisfitError(f"it was cast to {array.dtype} before")
    if any(part.factor is not None for part in array.parts) and not is_float(dtype):
        raise MisfitError(f"found {dtype}, wanted a floating-point dtype, for it is scaled")
    return dataclasses.replace(array, dtype=dtype, is_cast=True)


def scaled(array: VirtualArray, factor: float) -> VirtualArray:
    """Returns an array that is multiplied, after it was cast.

    Raises:
        MisfitError: its elements are no floating-point numbers.
    """
    if not is_float(array.dtype):
        raise MisfitError(f"found {array.dtype}, wanted a floating-point dtype")
    parts = tuple(
        dataclasses.replace(p, factor=factor if p.factor is None else p.factor * factor)
        for p in array.parts
    )
    return dataclasses.replace(array, parts=parts)
