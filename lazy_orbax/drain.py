"""Host to storage, slab by slab, and no faster than allowed."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import queue
import sys
import threading
import time
import weakref
from typing import Any

from lazy_orbax import snapshot
from lazy_orbax.host_budget import Lease
from lazy_orbax.plan import Plan
from lazy_orbax.snapshot import Held
from lazy_orbax.write import Request, Writer

# Slabs that may be with TensorStore at once: one being written while the next is handed over.
_MOST_WRITING = 2
_NICE = 10
# TensorStore's threads let go of what they have written a moment after they say so.
_LETTING_GO_S = 1.0
# How soon a save that waits for its turn sees that it need not.
_LOOK_S = 0.1


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
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


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
            if os.getpriority(os.PRIO_PROCESS, thread) == _NICE != usual:
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


class Pace:
    """A limit to the speed of writing, shared by all that one handler saves.

    Invariant, under the lock: `_free_at_s` is when what was let through so far has had its time.
    """

    def __init__(self, bytes_per_s: int | None):
        """Sets the limit.

        Args:
            bytes_per_s: the limit; `None` lets everything through at once.
        """
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def await_turn(self, n_bytes: int, ended: threading.Event) -> None:
        """Waits until `n_bytes` may be written, or until `ended` is set, or in a hurry not."""
        if self._bytes_per_s is None or _Urgency.hurry:
            return
        with self._lock:
            now_s = time.monotonic()
            turn_s = max(now_s, self._free_at_s)
            self._free_at_s = turn_s + n_bytes / self._bytes_per_s
        while not _Urgency.hurry and (left_s := turn_s - time.monotonic()) > 0:
            if ended.wait(min(left_s, _LOOK_S)):
                break


def drain(
    arriving: queue.SimpleQueue[tuple[Held, Lease] | None],
    writer: Writer,
    plan: Plan,
    *,
    pace: Pace,
    ended: threading.Event,
) -> None:
    """Writes slabs as they arrive, and returns their host memory as they are written.

    Args:
        arriving: the slabs with their leases; `None` comes last.
        writer: where to.
        plan: the plan that the slabs are from.
        pace: how fast.
        ended: set when the save is over, in which case nothing more needs to be written.

    Raises:
        SaveError: the storage refused something.
    """
    writing: collections.deque[tuple[list[Request], Held, Lease]] = collections.deque()

    def settle_oldest() -> None:
        futures, held, lease = writing[0]
        writer.wait(futures, held.slab)
        writing.popleft()
        buffer = held.buffer
        deaths = [] if buffer is None else _deaths_of(held)
        del futures, held  # The host copy dies here, and only then is its lease returned.
        is_read = not all(died.wait(_LETTING_GO_S) for died in deaths)
        lease.release(None if is_read else buffer)

    try:
        while True:
            while writing and (len(writing) == _MOST_WRITING or arriving.empty()):
                settle_oldest()
            item = arriving.get()
            if item is None:
                break
            pace.await_turn(item[0].slab.n_bytes, ended)
            held, lease = snapshot.to_host(item[0]), item[1]
            writing.append((writer.write(snapshot.views(plan, held)), held, lease))
            del item, held
        while writing and not ended.is_set():
            settle_oldest()
    finally:
        for futures, _, lease in writing:
            if writer.is_local:  # What hangs may do so for ever, and TensorStore reads it yet.
                lease.hold(future for future, _ in futures if not future.done())
        writing.clear()


def _deaths_of(held: Held) -> list[threading.Event]:
    """Returns events that are set as the views of a slab's buffer die."""
    deaths = []
    for array in (array for shards in held.arrays for array in shards.values()):
        if not array.flags.owndata:  # XLA hands out copies of what has less than a byte.
            died = threading.Event()
            weakref.finalize(array, died.set).atexit = False
            deaths.append(died)
    return deaths
