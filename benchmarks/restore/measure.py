"""Measures one restore in this process: time, CPU, memory, what was read."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks import meters
from benchmarks.restore import page_cache

_IO = pathlib.Path("/proc/self/io")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one restore took.

    Attributes:
        began_s: when it began, on the clock that all processes of the machine share.
        ended_s: when all of it was there.
        cpu_s: user and system seconds of the process.
        peak_bytes: the highest resident memory, less what was resident before.
        kernel_peak: whether the kernel told that, and no samples did.
        read_bytes: what storage delivered.
        asked_bytes: what was asked for in calls that read, be it from the page cache.
        read_calls: how many such calls.
        cached_bytes: what was still in the page cache before, which should be nothing.
    """

    began_s: float
    ended_s: float
    cpu_s: float
    peak_bytes: int
    kernel_peak: bool
    read_bytes: int
    asked_bytes: int
    read_calls: int
    cached_bytes: int


def measure(
    restore: Callable[[], Any], files: list[pathlib.Path], *, is_first: bool
) -> tuple[Any, Measured]:
    """Restores once, with `files` out of the page cache, and returns what came of it.

    The first time the allocator gives back what is free, so that memory which the restore takes is
    seen; later it may take what it kept, as it would in a job that restores again.
    """
    cached_bytes = page_cache.evict(files)
    gc.collect()
    if is_first:
        meters.release_free_memory()
    baseline_bytes, kernel_peak = meters.rss_bytes(), meters.reset_kernel_peak()
    with contextlib.nullcontext() if kernel_peak else meters.RssSampler() as sampler:
        before, cpu_before_s, began_s = _io_counts(), meters.cpu_s(), time.monotonic()
        value = restore()
        ended_s, cpu_s, after = time.monotonic(), meters.cpu_s() - cpu_before_s, _io_counts()
    peak_bytes = sampler.peak_bytes if sampler is not None else meters.kernel_peak_bytes()
    return value, Measured(
        began_s=began_s,
        ended_s=ended_s,
        cpu_s=cpu_s,
        peak_bytes=peak_bytes - baseline_bytes,
        kernel_peak=kernel_peak,
        read_bytes=after["read_bytes"] - before["read_bytes"],
        asked_bytes=after["rchar"] - before["rchar"],
        read_calls=after["syscr"] - before["syscr"],
        cached_bytes=cached_bytes,
    )


def _io_counts() -> dict[str, int]:
    lines = (line.partition(":") for line in _IO.read_text().splitlines())
    return {name: int(value) for name, _, value in lines}
