"""Host memory as NumPy and XLA take it."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time

import numpy as np

ALIGNMENT = 64
_HUGE_PAGE = 2**21
# To touch as much in small pages takes 0.5 to 2 ms of the processor, a huge page 0.2, a slow one 5.
_SLOW_TOUCH_S = 0.0015
_WITHOUT_HUGE_PAGES = getattr(mmap, "MADV_NOHUGEPAGE", 15)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def aligned(n_bytes: int) -> np.ndarray:
    """Returns uninitialised memory that starts where any dtype, and XLA, may have its elements."""
    # Linux gives large arrays of NumPy huge pages, where a whole one fits in.
    alignment = _HUGE_PAGE if n_bytes >= _HUGE_PAGE else ALIGNMENT
    whole = np.empty(n_bytes + alignment, np.uint8)
    first = -whole.ctypes.data % alignment
    return whole[first : first + n_bytes]


class Slabs:
    """Gives slabs of memory, of huge pages unless these are slow to touch for the first time.

    A virtual machine may have given memory that was free back to its host, in pieces as large as
    huge pages. Each of those then costs milliseconds; small pages are mostly made of what is left.
    """

    def __init__(self) -> None:
        self._has_slow_pages = False

    def new(self, n_bytes: int) -> np.ndarray:
        """Returns what `aligned` does."""
        slab = aligned(n_bytes)
        if n_bytes < 2 * _HUGE_PAGE or _LIBC is None:
            return slab
        # Each, and now: those that are quick are taken first, by whoever comes first.
        pages = iter(range(0, n_bytes, _HUGE_PAGE))
        while not self._has_slow_pages and (start := next(pages, None)) is not None:
            began_s = time.thread_time()
            slab[start] = 0
            self._has_slow_pages = time.thread_time() - began_s > _SLOW_TOUCH_S
        if self._has_slow_pages:  # Where the kernel refuses, they stay as they are.
            address, length = ctypes.c_void_p(slab.ctypes.data), ctypes.c_size_t(n_bytes)
            _LIBC.madvise(address, length, _WITHOUT_HUGE_PAGES)
        return slab


def rounded_up(n_bytes: int) -> int:
    """Returns where the next thing may start behind so many bytes."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
