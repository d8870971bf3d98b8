"""Whether a copy to the host inside the step hides behind its compute."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.gpu import fused
from benchmarks.jobs import Channel, Job


def _in_pinned_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), tree)


def in_step(job: Job, channel: Channel) -> None:
    """Whether a copy to the host inside the step hides behind its compute."""
    state, step, count = fused.calibrate(job.settings, fused.build(job.settings))
    targets = _in_pinned_host(state)
    matrix = fused.matrix_of(job.settings)

    def with_copy(tree: Any, x: jax.Array, n: int) -> Any:
        return fused.body(tree, x, n), jax.device_put(tree, targets)

    copying = jax.jit(with_copy, donate_argnums=0)
    for peer, program in (("in_step", copying), (fused.RAW, jax.jit(fused.body, donate_argnums=0))):
        # Whether the compiler copies on the device first, because the state is updated in place.
        memory = program.lower(state, matrix, count).compile().memory_analysis()
        if memory is not None:
            channel.sample(peer, "temporary_device_memory", memory.temp_size_in_bytes, "bytes")
    state, copied = copying(state, matrix, count)
    del copied
    for _ in range(job.settings.repeats):
        plain_s, state = fused.timed(step, state)
        copy_s, copied = fused.timed(jax.device_put, state, targets)
        del copied
        both_s, (state, copied) = fused.timed(copying, state, matrix, count)
        del copied
        channel.sample(fused.RAW, "step", plain_s)
        channel.sample(fused.RAW, "copy_alone", copy_s)
        channel.sample("in_step", "step_with_copy", both_s)
        # 1: hidden completely. 0: one after the other.
        channel.sample("in_step", "copy_hidden", (plain_s + copy_s - both_s) / copy_s, "ratio")
    channel.tick()
