"""Lets the system read files of a local directory before somebody asks for their bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from lazy_orbax.storage import threads
from lazy_orbax.storage.places import Done

_CAN_ADVISE = hasattr(os, "posix_fadvise")
# Fewer are read before anybody could be told.
_LEAST_BYTES = 2**24
# What a disk delivers while a restore is planned. It is not much of any machine's memory.
_MOST_BYTES = 2**28


def start_to_fill(directory: str, sizes: Mapping[str, int]) -> Any:
    """Starts to read files into the page cache, the first ones if they are too large together.

    Args:
        directory: the directory.
        sizes: bytes of each file, by its path relative to the directory, in the order in which they
            will be wanted.

    Returns:
        A future that is done when no file is held open any more. It never fails: who reads the
        files finds out what is wrong with them.
    """
    if not _CAN_ADVISE or sum(sizes.values()) < _LEAST_BYTES:
        return Done(None)
    return threads.run(lambda: _fill(directory, sizes), "lazy_orbax-ahead")


def _fill(directory: str, sizes: Mapping[str, int]) -> None:
    left = _MOST_BYTES
    for name, size in sizes.items():
        if left <= 0:
            return
        with contextlib.suppress(OSError):
            path = os.path.join(directory, name)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, min(size, left), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
        left -= size
