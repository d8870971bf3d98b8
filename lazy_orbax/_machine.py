"""What this machine has and allows: memory, scheduling priority, and whether saves are urgent."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Some device memory is always lost to fragmentation.
_USABLE_FRACTION = 0.95
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
_NICE, _LEAST = 10, 19


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pauses Python's garbage collector: it would walk, again and again, what is only growing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def memory_bytes() -> int:
    """Returns the memory of this machine, or of its container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(pathlib.Path, _CGROUP_LIMITS):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def free_device_bytes(device: Any) -> float:
    """Returns the memory of `device` that a step at its peak leaves free, in bytes.

    Where the backend has no statistics everything is assumed to fit.
    """
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return math.inf
    used = max(stats.get("peak_bytes_in_use", 0), stats.get("bytes_in_use", 0))
    return stats["bytes_limit"] * _USABLE_FRACTION - used


class _Urgency:
    """Whether saves of this process are in a hurry. Plain flags: a signal handler sets them."""

    hurry = False
    lowered = False


def hurry(*, on: bool = True) -> None:
    """Lets every save of this process write as fast as it can, from now on, or no more so."""
    _Urgency.hurry = on


def yield_to_training() -> None:
    """Lowers the scheduling priority of this thread and of those that it starts, where possible."""
    if sys.platform == "linux" and not _Urgency.hurry:  # Elsewhere it is the whole process's.
        _Urgency.lowered = True
        if priority_of_this_thread() < _lowered():  # A thread may not raise its own.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _lowered())


def _lowered() -> int:
    """Returns the priority of threads that yield, below that of the process."""
    return min(_LEAST, os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICE)


def is_urgent() -> bool:
    """Whether saves of this process are in a hurry."""
    return _Urgency.hurry


def priority_of_this_thread() -> int:
    """Returns the scheduling priority that threads have which this one starts."""
    if sys.platform != "linux":
        return 0
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def raise_priority() -> None:
    """Gives back the priority that threads had before `yield_to_training`.

    The kernel grants it to those who have the capability `SYS_NICE` or a limit `RLIMIT_NICE`;
    others keep the lowered priority until the threads end.
    """
    if not _Urgency.lowered:
        return
    usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(OSError):  # It ended, or may not.
            if os.getpriority(os.PRIO_PROCESS, thread) == _lowered() != usual:
                os.setpriority(os.PRIO_PROCESS, thread, usual)


def give_back_memory() -> None:
    """Makes the C library return what TensorStore freed: else a process that saves often grows."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def _glibc() -> Any | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


_LIBC = _glibc()
