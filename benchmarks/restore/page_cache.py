"""Puts files out of the page cache, and looks whether they are."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

_DROP_CACHES = pathlib.Path("/proc/sys/vm/drop_caches")
_CLEAN_PAGES = "1"
_LIBC = ctypes.CDLL(None, use_errno=True)


def evict(files: Iterable[pathlib.Path]) -> int:
    """Puts files, which must be synced, out of the page cache.

    The caches of the whole machine are dropped only where asking for each file was not enough,
    and only where that is allowed.

    Returns:
        How many of their bytes are still in it.
    """
    files = list(files)
    for path in files:
        with _opened(path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident_bytes(files)
    if left:
        with contextlib.suppress(OSError):
            _DROP_CACHES.write_text(_CLEAN_PAGES)
            left = resident_bytes(files)
    return left


def resident_bytes(files: Iterable[pathlib.Path]) -> int:
    """Returns how many bytes of these files are in the page cache, in whole pages."""
    return sum(map(_resident_bytes, files))


def _resident_bytes(path: pathlib.Path) -> int:
    with _opened(path) as descriptor:
        n_bytes = os.fstat(descriptor).st_size
        if not n_bytes:
            return 0
        with mmap.mmap(descriptor, n_bytes, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            pages = np.zeros(-(-n_bytes // mmap.PAGESIZE), np.uint8)
            address = ctypes.c_void_p(view.ctypes.data)
            failed = _LIBC.mincore(
                address, ctypes.c_size_t(n_bytes), ctypes.c_void_p(pages.ctypes.data)
            )
            del view  # Else the mapping cannot be closed.
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int((pages & 1).sum()) * mmap.PAGESIZE


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
