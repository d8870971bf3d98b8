"""What `auto` does when only half of the state fits beside it on the device."""

from __future__ import annotations

import queue
import time

import jax
import jax.numpy as jnp

import lazy_orbax
from benchmarks import workloads
from benchmarks.gpu import fused
from benchmarks.jobs import Channel, Job, scratch
from benchmarks.peers import PEERS, manager, save_args

# `auto` leaves as much of the device alone.
_UNUSED_FRACTION = 0.05


def headroom(job: Job, channel: Channel) -> None:
    """What `auto` does when only half of the state fits beside it on the device."""
    state, step, _ = fused.calibrate(job.settings, fused.build(job.settings))
    n_bytes = workloads.state_bytes(state)
    ballast = _ballast(n_bytes // 2)
    if not ballast:
        why = "not restricted: the device is full already, or does not count its memory"
        channel.sample("lazy", "headroom", why, "text")
    plain_s, state = fused.timed(step, state)
    timelines: queue.SimpleQueue[lazy_orbax.SaveTimeline] = queue.SimpleQueue()
    peer, on_timeline = PEERS["lazy"], timelines.put
    with (
        scratch(job.settings) as directory,
        manager(
            peer, directory, state_bytes=n_bytes, on_timeline=on_timeline, max_to_keep=1
        ) as opened,
    ):
        for i in range(1 + job.settings.repeats):
            start_s = time.perf_counter()
            opened.save(i, args=save_args(peer, state))
            save_s = time.perf_counter() - start_s
            step_s, state = fused.timed(step, state)
            opened.wait_until_finished()
            timeline = timelines.get(timeout=60)
            if i:  # The first one compiles.
                channel.sample("lazy", "save", save_s)
                channel.sample("lazy", "step_otherwise_median", plain_s)
                channel.sample("lazy", "step_after_save", step_s)
                channel.sample("lazy", "waited", timeline.waited_s)
                channel.sample("lazy", "mode", timeline.mode, "text")
    del ballast
    channel.tick()


def _ballast(free_bytes: int) -> list[jax.Array]:
    """Fills each device until only its share of `free_bytes` is left. Empty where none counts."""
    devices = jax.local_devices()
    ballast = []
    for device in devices:
        stats = device.memory_stats()
        if not stats:
            return []
        # What the step takes at its peak is not free.
        used = max(stats["peak_bytes_in_use"], stats["bytes_in_use"])
        left = free_bytes // len(devices) + int(_UNUSED_FRACTION * stats["bytes_limit"])
        n_bytes = stats["bytes_limit"] - used - left
        if n_bytes > 0:
            ballast.append(jnp.zeros(n_bytes, jnp.uint8, device=device))
    return jax.block_until_ready(ballast)
