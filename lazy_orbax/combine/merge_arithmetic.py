"""Sums of arrays, element by element in a fixed order: each product and each sum is rounded once.

For float32 the result is that of `c0 * x0 + c1 * x1 + ...` in NumPy, from left to right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lazy_orbax.restore.rounding import round_to

# Of elements that are worked on while they are in the processor's cache.
_BLOCK = 2**16


@np.errstate(all="ignore")  # What is not finite, or gets too large, is the caller's.
def add(total: np.ndarray, data: np.ndarray, factor: float, *, is_first: bool) -> None:
    """Adds a multiple of an array.

    Args:
        total: what is added to, in one dimension, of float32, float64 or complex numbers.
        data: the array, of as many elements, in any dtype of floats. May be `total` itself, if it
            is the first.
        factor: the multiple, which is rounded to the dtype of `total`.
        is_first: whether `total` has nothing yet.
    """
    by = total.dtype.type(factor)
    spare = np.empty(min(_BLOCK, total.size), total.dtype)
    for first in range(0, total.size, _BLOCK):
        block = slice(first, first + _BLOCK)
        _add_block(total[block], data[block], by, spare, is_first=is_first)


def _add_block(
    sums: np.ndarray, some: np.ndarray, by: Any, spare: np.ndarray, *, is_first: bool
) -> None:
    into = sums if is_first else spare[: sums.size]
    if some.dtype != sums.dtype:
        np.copyto(into, some, casting="unsafe")
        some = into
    np.multiply(some, by, out=into)
    if not is_first:
        np.add(sums, into, out=sums)


@np.errstate(all="ignore")
def combine(
    result: np.ndarray, arrays: Sequence[np.ndarray], factors: Sequence[float], total: np.dtype
) -> None:
    """Writes the sum of multiples of arrays, each block of it while that is in the cache.

    Args:
        result: where it goes, in one dimension. May begin where the first array does, if its
            elements have no more bytes.
        arrays: of as many elements, in any dtype of floats.
        factors: the multiple of each.
        total: the dtype in which they are added up.
    """
    n, many = min(_BLOCK, result.size), [total.type(factor) for factor in factors]
    total_block, spare = np.empty(n, total), np.empty(n, total)
    for first in range(0, result.size, _BLOCK):
        block = slice(first, first + _BLOCK)
        into = result[block]
        sums = into if into.dtype == total else total_block[: into.size]
        for i, (array, by) in enumerate(zip(arrays, many, strict=True)):
            _add_block(sums, array[block], by, spare, is_first=i == 0)
        if sums is not into:
            round_to(into, sums)
