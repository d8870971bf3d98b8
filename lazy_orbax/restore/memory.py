"""Host memory as NumPy and XLA take it."""

from __future__ import annotations

import numpy as np

ALIGNMENT = 64
_HUGE_PAGE = 2**21


def aligned(n_bytes: int) -> np.ndarray:
    """Returns uninitialised memory that starts where any dtype, and XLA, may have its elements."""
    # Linux gives large arrays of NumPy huge pages, where a whole one fits in.
    alignment = _HUGE_PAGE if n_bytes >= _HUGE_PAGE else ALIGNMENT
    whole = np.empty(n_bytes + alignment, np.uint8)
    first = -whole.ctypes.data % alignment
    return whole[first : first + n_bytes]


def rounded_up(n_bytes: int) -> int:
    """Returns where the next thing may start behind so many bytes."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
