"""The state and the step of the measurements: forward, backward and update in one program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import stall, workloads
from benchmarks.jobs import Settings

# In place of a peer, for figures that belong to none.
RAW = "raw"
_GB = 10**9
_GIGABYTES = {"full": 10.0, "small": 1.0, "tiny": 0.004}
_LEAF_SIDE = {"full": 4096, "small": 2048, "tiny": 256}
_STEP_S = {"full": 0.5, "small": 0.1, "tiny": 0.005}
SCHEDULES = {
    # One checkpoint per 10 s. One is kept: several of this size may not fit the disk.
    "full": stall.Schedule(3, 20, _STEP_S["full"], max_to_keep=1),
    "small": stall.Schedule(3, 30, _STEP_S["small"], max_to_keep=1),
    "tiny": stall.Schedule(2, 3, _STEP_S["tiny"], max_to_keep=1),
}


def bytes_of_state(settings: Settings) -> int:
    return int((settings.gigabytes or _GIGABYTES[settings.size]) * _GB)


def build(settings: Settings) -> Any:
    """Returns the state, made on the devices."""
    side, mesh = _LEAF_SIDE[settings.size], workloads.mesh_of_all_devices()
    make = jax.jit(
        lambda key: jax.random.normal(key, (side, side)), out_shardings=NamedSharding(mesh, P("d"))
    )
    keys = jax.random.split(jax.random.key(0), max(1, bytes_of_state(settings) // (4 * side**2)))
    state = {f"leaf_{i:04}": make(key) for i, key in enumerate(keys)}
    return jax.block_until_ready(state)


def matrix_of(settings: Settings) -> jax.Array:
    """Returns the matrix that a step multiplies; on each device the same."""
    side = _LEAF_SIDE[settings.size]
    everywhere = NamedSharding(workloads.mesh_of_all_devices(), P())
    return jax.device_put(jnp.eye(side, dtype=jnp.bfloat16), everywhere)


def gradients(state: Any, x: jax.Array, count: int) -> tuple[jax.Array, None]:
    """Stands for forward and backward: products of matrices. Its gradient is one number."""
    del state
    y = jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)
    # Needs the result of the last product, so that it comes after it.
    return 1e-6 * y[0, 0].astype(jnp.float32), None


def update(state: Any, rate: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf + rate, state)


def body(state: Any, x: jax.Array, count: int) -> Any:
    return update(state, gradients(state, x, count)[0])


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start_s, result


def calibrate(settings: Settings, state: Any) -> tuple[Any, workloads.Step, int]:
    """Returns the state, the fused donating step, and its number of products."""
    matrix = matrix_of(settings)
    fused = jax.jit(body, donate_argnums=0)
    _, state = timed(fused, state, matrix, 1)
    short_s, state = timed(fused, state, matrix, 1)
    long_s, state = timed(fused, state, matrix, 33)
    once_s = max(1e-6, (long_s - short_s) / 32)
    count = max(1, round((_STEP_S[settings.size] - short_s) / once_s))
    return state, lambda tree: jax.block_until_ready(fused(tree, matrix, count)), count
