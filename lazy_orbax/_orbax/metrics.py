"""Orbax's own names of what it measures, under which its exporters look."""

from __future__ import annotations

import jax

_GIB = 2**30


def record_read(directory: str, n_bytes: int, duration_s: float) -> None:
    """Records a restore as Orbax records its own.

    Args:
        directory: the item's directory.
        n_bytes: bytes that this process needed.
        duration_s: seconds from the first request to the last array.
    """
    is_bucket = directory.startswith("gs://")
    where = {"storage_type": "gcs" if is_bucket else "other", "custom_prefix": ""}
    prefix, rate = "/jax/orbax/read/worker", n_bytes / _GIB / max(duration_s, 1e-9)
    jax.monitoring.record_event_duration_secs(f"{prefix}/total_duration_secs", duration_s, **where)
    jax.monitoring.record_scalar(f"{prefix}/io/requested/gbytes", n_bytes / _GIB, **where)
    jax.monitoring.record_scalar(f"{prefix}/io/requested/throughput/gbytes_per_sec", rate, **where)
    jax.monitoring.record_scalar("/jax/checkpoint/read/gbytes_per_sec", rate)
    jax.monitoring.record_scalar("/jax/checkpoint/read/gbytes", n_bytes / _GIB)
