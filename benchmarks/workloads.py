"""The states that are saved, and the steps that run between the saves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIZES = ("full", "small", "tiny")
_BATCH_BYTES = 64 * 2**20

Step = Callable[[Any], Any]
"""Takes the state, donates it, and returns the next one when that is computed."""


_SPLIT_ROWS = P("d")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a state: what it is made from."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    spec: P = _SPLIT_ROWS

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def many_small(size: str) -> dict[str, Leaf]:
    """1000 leaves of 256 KiB: what costs is the number of leaves."""
    count, side = {"full": (1000, 256), "small": (200, 256), "tiny": (8, 32)}[size]
    return {f"leaf_{i:04}": Leaf((side, side)) for i in range(count)}


def few_large(size: str) -> dict[str, Leaf]:
    """24 leaves of 64 MiB: what costs is the bytes."""
    count, side = {"full": (24, 4096), "small": (8, 2048), "tiny": (3, 512)}[size]
    return {f"leaf_{i:02}": Leaf((side, side)) for i in range(count)}


def transformer(size: str) -> dict[str, Any]:
    """Parameters and Adam's two moments of a language model, 0.5 GB.

    bfloat16 weights with a bfloat16 first and a float32 second moment, embeddings split over the
    vocabulary, half of the layers stacked as by `scan`, norms and counters replicated.
    """
    width, layers, vocabulary = {
        "full": (640, 10, 16_000),
        "small": (256, 4, 4_000),
        "tiny": (32, 2, 64),
    }[size]

    def layer(dtype: Any, stack: tuple[int, ...]) -> dict[str, Leaf]:
        rows, columns = P(*[None] * len(stack), "d"), P(*[None] * len(stack), None, "d")
        return {
            "norm": Leaf((*stack, width), jnp.float32, P()),
            "bias": Leaf((*stack, width), dtype, P()),
            "qkv": Leaf((*stack, width, 3 * width), dtype, columns),
            "out": Leaf((*stack, width, width), dtype, rows),
            "up": Leaf((*stack, width, 4 * width), dtype, columns),
            "down": Leaf((*stack, 4 * width, width), dtype, rows),
        }

    def parameters(dtype: Any) -> dict[str, Any]:
        return {
            "embedding": Leaf((vocabulary, width), dtype, P("d")),
            "stacked": layer(dtype, (layers // 2,)),
            "layers": [layer(dtype, ()) for _ in range(layers - layers // 2)],
            "norm": Leaf((width,), jnp.float32, P()),
        }

    adam = {"mu": parameters(jnp.bfloat16), "nu": parameters(jnp.float32)}
    adam["count"] = Leaf((), jnp.int32, P())
    return {"params": parameters(jnp.bfloat16), "adam": adam, "step": Leaf((), jnp.int32, P())}


def tiny_leaves(count: int) -> dict[str, Leaf]:
    """Leaves of 4 KiB, to see what one leaf costs."""
    return {f"leaf_{i:05}": Leaf((16, 64)) for i in range(count)}


WORKLOADS = {"many_small": many_small, "few_large": few_large, "transformer": transformer}


def mesh_of_all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("d",))


def build(leaves: Any, mesh: Mesh) -> Any:
    """Returns the state: random values, which compress as badly as real weights do."""
    rng = np.random.default_rng(0)
    flat, structure = jax.tree.flatten(leaves)
    arrays: list[jax.Array] = []
    batch: list[np.ndarray] = []
    batch_bytes = 0
    for i, leaf in enumerate(flat):
        values = rng.standard_normal(leaf.shape or (1,), dtype=np.float32).reshape(leaf.shape)
        batch.append((0.02 * values).astype(leaf.dtype))
        batch_bytes += leaf.n_bytes
        if batch_bytes >= _BATCH_BYTES or i == len(flat) - 1:
            targets = [NamedSharding(mesh, x.spec) for x in flat[len(arrays) : i + 1]]
            placed = jax.device_put(batch, targets, may_alias=False)
            arrays += jax.block_until_ready(placed)
            batch, batch_bytes = [], 0
    return structure.unflatten(arrays)


def state_bytes(state: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def donating_update(state: Any, mesh: Mesh) -> Step:
    """Returns a jitted program that donates the state and changes an element of each shard.

    Its time does not grow with the bytes of the state, as long as donation works: if somebody
    holds on to a buffer, the backend must copy it and the step time shows that.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)

    def touch(shard: jax.Array) -> jax.Array:
        if shard.ndim == 0:
            return shard + 1
        if shard.dtype == jnp.bfloat16:
            # Donated and handed on as it is: XLA for CPU would convert all of it to float32.
            return shard
        origin = (0,) * shard.ndim
        first = jax.lax.slice(shard, origin, (1,) * shard.ndim)
        return jax.lax.dynamic_update_slice(shard, first + jnp.ones_like(first), origin)

    mapped = jax.shard_map(
        lambda shards: jax.tree.map(touch, shards),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)


def idle_step(update: Step, wait_s: float) -> Step:
    """A step on an emulated accelerator: it takes time, and the CPU is idle meanwhile.

    This is what `time.sleep` stands for here: the host of a real accelerator waits as well. The
    accelerator is emulated badly in one respect, to our disadvantage: a real one computes while
    the host is inside `save()`, so a short `save()` costs a real loop nothing.
    """

    def step(state: Any, update: Step = update) -> Any:
        state = jax.block_until_ready(update(state))
        time.sleep(wait_s)
        return state

    return step


def busy_step(update: Step, work_s: float) -> Step:
    """A step that computes on the CPU for about `work_s` seconds: products of matrices."""
    side = 512
    start = jax.device_put(np.eye(side, dtype=np.float32), jax.devices()[0])

    @jax.jit
    def compute(x: jax.Array, count: int) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)

    def seconds(count: int) -> float:
        start_s = time.perf_counter()
        jax.block_until_ready(compute(start, count))
        return time.perf_counter() - start_s

    seconds(1)
    once_s = min(seconds(8) for _ in range(5)) / 8
    count = max(1, round(work_s / once_s))

    def step(state: Any, update: Step = update) -> Any:
        state = update(state)
        jax.block_until_ready((state, compute(start, count)))
        return state

    return step


STEPS: dict[str, Callable[[Step, float], Step]] = {"idle": idle_step, "busy": busy_step}
