"""Orbax's own names of what it measures, under which its exporters look."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

import jax

from lazy_orbax.timeline import SaveTimeline

_GIB = 2**30
# Orbax's exporters ship what begins so. What only lazy_orbax has is named `lazy_...` below it.
_WRITE = "/jax/orbax/write"
_P = ParamSpec("_P")
_log = logging.getLogger("lazy_orbax")


def _without_failing(record: Callable[_P, None]) -> Callable[_P, None]:
    """Makes a function that records log what a listener raises: no save fails for that."""

    @functools.wraps(record)
    def recording(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            record(*args, **kwargs)
        except Exception:  # noqa: BLE001 - Listeners are anybody's.
            _log.exception("A listener of jax.monitoring raised.")

    return recording


@_without_failing
def record_read(directory: str, n_bytes: int, duration_s: float) -> None:
    """Records a restore as Orbax records its own.

    Args:
        directory: the item's directory.
        n_bytes: bytes that this process needed.
        duration_s: seconds from the first request to the last array.
    """
    _record_worker("read", directory, n_bytes, duration_s)
    rate = n_bytes / _GIB / max(duration_s, 1e-9)
    jax.monitoring.record_scalar("/jax/checkpoint/read/gbytes_per_sec", rate)
    jax.monitoring.record_scalar("/jax/checkpoint/read/gbytes", n_bytes / _GIB)


def _record_worker(direction: str, directory: str, n_bytes: int, duration_s: float) -> None:
    """Records what this process read or wrote."""
    is_bucket = directory.startswith("gs://")
    where = {"storage_type": "gcs" if is_bucket else "other", "custom_prefix": ""}
    prefix, gib = f"/jax/orbax/{direction}/worker", n_bytes / _GIB
    jax.monitoring.record_event_duration_secs(f"{prefix}/total_duration_secs", duration_s, **where)
    jax.monitoring.record_scalar(f"{prefix}/io/requested/gbytes", gib, **where)
    rate = gib / max(duration_s, 1e-9)
    jax.monitoring.record_scalar(f"{prefix}/io/requested/throughput/gbytes_per_sec", rate, **where)


@_without_failing
def record_blocking(timeline: SaveTimeline) -> None:
    """Records, as Orbax does, how long `save()` took until the caller's arrays are free.

    Args:
        timeline: of a save that has put every byte out of reach.
    """
    planned_s, enqueued_s = timeline.planned_s or 0.0, timeline.enqueued_s or 0.0
    rate = timeline.bytes_written / _GIB / max(enqueued_s, 1e-9)
    jax.monitoring.record_scalar(f"{_WRITE}/blocking_gbytes_per_sec", rate)
    _duration("blocking_tree_map_duration_secs", planned_s)
    _duration("blocking_d2h_duration_secs", enqueued_s - planned_s)
    _duration("lazy_waited_for_room_secs", timeline.waited_s)


@_without_failing
def record_save(timeline: SaveTimeline, *, host_peak_bytes: int) -> None:
    """Records a save that has ended: its moments, in seconds since `save()` began, and its rate.

    Args:
        timeline: of the save.
        host_peak_bytes: most bytes of snapshots that were ever in host memory.
    """
    jax.monitoring.record_scalar(f"{_WRITE}/lazy_host_peak_gbytes", host_peak_bytes / _GIB)
    if timeline.error is not None:
        jax.monitoring.record_event(f"{_WRITE}/lazy_failed")
        return
    for moment in ("staged", "durable", "committed"):
        if (seconds := getattr(timeline, f"{moment}_s")) is not None:
            _duration(f"lazy_{moment}_secs", seconds)
    if timeline.durable_s is not None:
        _record_worker("write", timeline.directory, timeline.bytes_written, timeline.durable_s)
        gib = timeline.bytes_written / _GIB
        jax.monitoring.record_scalar(f"{_WRITE}/gbytes", gib)
        jax.monitoring.record_scalar(
            f"{_WRITE}/gbytes_per_sec", gib / max(timeline.durable_s, 1e-9)
        )


@_without_failing
def record_stall(seconds: float) -> None:
    """Records by how much the steps around a save took longer than others."""
    _duration("lazy_stall_secs", seconds)


def _duration(name: str, seconds: float) -> None:
    jax.monitoring.record_event_duration_secs(f"{_WRITE}/{name}", seconds)
