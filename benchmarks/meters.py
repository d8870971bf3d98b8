"""Reads what the kernel counts: CPU seconds, resident memory, bytes on disk."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pathlib
import resource
import threading

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STATUS = pathlib.Path("/proc/self/status")


def cpu_s() -> float:
    """User and system seconds of this process, all threads. Kernel write-back is not in it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def release_free_memory() -> None:
    """Gives back what is free but still mapped, so that a baseline has nothing else in it."""
    gc.collect()
    # With another libc the baseline is higher by what that keeps.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_kernel_peak() -> bool:
    """Makes the kernel forget the highest RSS so far. Returns whether it may."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def kernel_peak_bytes() -> int:
    """The highest RSS since `reset_kernel_peak`, or since the process started."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class RssSampler:
    """Samples RSS in a thread, for systems where the kernel's peak cannot be reset."""

    def __init__(self, interval_s: float = 0.004):
        self.peak_bytes = 0
        self._interval_s, self._ended = interval_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss-sampler", daemon=True)

    def __enter__(self) -> RssSampler:
        self.peak_bytes = rss_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, rss_bytes())

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, rss_bytes())


def files_under(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def disk_bytes(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in files_under(directory))


def drop_from_page_cache(directory: pathlib.Path) -> None:
    """Makes the next read of these files come from storage. Needs no privileges."""
    os.sync()
    for path in files_under(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
