"""The ceilings: copies between device and host, and what a view of pinned memory costs."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import fused
from benchmarks.jobs import Channel, Job, Settings

_MOST_TRANSFER_BYTES = 2 * 10**9


def _bytes_of_transfer(settings: Settings) -> int:
    return min(fused.bytes_of_state(settings), _MOST_TRANSFER_BYTES)


def transfers(job: Job, channel: Channel) -> None:
    """The ceilings: device to device, and to the host and back, pinned and pageable."""
    n_bytes = _bytes_of_transfer(job.settings)
    device = jax.devices()[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    pinned = on_device.with_memory_kind("pinned_host")
    source = jax.block_until_ready(jax.device_put(jnp.ones(n_bytes // 4), on_device))
    copy = jax.jit(lambda x: x + 1)
    host = np.ones(n_bytes // 4, np.float32)
    for repeat in range(job.settings.repeats + 1):
        taken = {
            "device_to_device": fused.timed(copy, source)[0],
            "pageable_to_device": fused.timed(jax.device_put, host, on_device)[0],
        }
        taken["device_to_pinned"], on_host = fused.timed(jax.device_put, source, pinned)
        taken["pinned_to_device"] = fused.timed(jax.device_put, on_host, on_device)[0]
        del on_host
        fresh = jax.block_until_ready(copy(source))  # Has no copy on the host yet.
        start_s = time.perf_counter()
        np.array(fresh)
        taken["device_to_pageable"] = time.perf_counter() - start_s
        for name, value in taken.items():
            # The first time, memory is allocated and page-locked, and programs are compiled.
            metric = name if repeat else f"{name}_first"
            channel.sample(fused.RAW, metric, source.nbytes / value, "bytes/s")
    channel.tick()


def view_of_pinned(job: Job, channel: Channel) -> None:
    """Whether a NumPy view of an array in pinned host memory costs a copy."""
    n_bytes = _bytes_of_transfer(job.settings)
    device = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    for _ in range(job.settings.repeats):
        array = jax.block_until_ready(jax.device_put(jnp.ones(n_bytes // 4), pinned))
        start_s = time.perf_counter()
        view = np.asarray(array)
        channel.sample(fused.RAW, "view_of_pinned", time.perf_counter() - start_s)
        try:
            same = view.ctypes.data == array.unsafe_buffer_pointer()
        except (RuntimeError, NotImplementedError) as error:
            channel.sample(fused.RAW, "view_shares_memory", f"unknown: {error}", "text")
        else:
            channel.sample(fused.RAW, "view_shares_memory", float(same), "ratio")
        del view, array
    channel.tick()
