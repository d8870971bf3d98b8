"""Floats as narrower ones, rounded once: to the nearest, and of two such to the even."""

from __future__ import annotations

import numpy as np

_DIRECT = frozenset({"float16", "float32", "float64", "complex64", "complex128"})
# Of elements that are worked on while they are in the processor's cache.
_BLOCK = 2**16


@np.errstate(all="ignore")  # What is not finite, or gets too large, is the caller's.
def round_to(result: np.ndarray, values: np.ndarray) -> None:
    """Rounds an array to another dtype.

    Args:
        result: where it goes, in any dtype of floats.
        values: of the same shape, as `float32`, `float64` or complex numbers.
    """
    if result.dtype.name in _DIRECT or values.dtype != np.float64:
        np.copyto(result, values, casting="unsafe")
        return
    # NumPy rounds to such a dtype by way of float32.
    axis = int(np.argmax(values.shape)) if values.ndim else 0
    into, some = (np.moveaxis(np.atleast_1d(one), axis, 0) for one in (result, values))
    rows = max(1, _BLOCK * len(some) // max(1, some.size))
    for first in range(0, len(some), rows):
        block = slice(first, first + rows)
        np.copyto(into[block], _to_odd(some[block]), casting="unsafe")


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Returns float64 as float32, inexact ones with a last bit of 1.

    That is as good as all bits for who rounds once more, to a dtype of far fewer (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 2008).
    """
    near = values.astype(np.float32)
    is_even = (near.view(np.uint32) & 1) == 0
    wrong = is_even & (near != values) & np.isfinite(near)
    towards = np.where(values > near, np.float32(np.inf), np.float32(-np.inf))
    return np.where(wrong, np.nextafter(near, towards), near)
