"""The states: made from a seed, saved, and compared with what was restored, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks.restore.cases import WORKLOADS, Reading, Writing

DTYPES = ("float32", "bfloat16")
"""What may be asked for. The first is what is saved."""

Digests = dict[str, list[str]]
"""By dtype: of each leaf, in the order of their names, cast to it."""


def names_of(run: Reading | Writing) -> list[str]:
    return [f"leaf_{i:05}" for i in range(WORKLOADS[run.workload].leaves[run.size])]


def shape_of(run: Reading | Writing) -> tuple[int, ...]:
    return WORKLOADS[run.workload].shape(run.size)


def values_of(run: Writing) -> Iterator[np.ndarray]:
    """Yields random leaves, which compress as badly as real weights do."""
    for i in range(len(names_of(run))):
        values = np.random.default_rng(i).standard_normal(shape_of(run), dtype=np.float32)
        values *= 0.02
        yield values


def sharding_of(target: str, layers: int = 0) -> Any:
    """Returns the sharding that a target of `cases.TARGETS` means, on the devices there are.

    Args:
        target: its name.
        layers: whether leaves are stacks of so many: each of these is divided.
    """
    devices = np.array(jax.devices())
    if target == "one_device":
        return SingleDeviceSharding(devices[0])
    if target == "part":
        return NamedSharding(Mesh(devices[: max(1, len(devices) // 2)], ("d",)), P("d"))
    if target == "grid":
        halves = 2 if len(devices) % 2 == 0 else 1
        return NamedSharding(Mesh(devices.reshape(halves, -1), ("a", "b")), P("a", "b"))
    rows, columns = P("d"), P(None, "d")
    same = columns if layers else rows  # Those of each layer.
    spec = {"same": same, "axis_1": columns, "replicated": P()}[target]
    return NamedSharding(Mesh(devices, ("d",)), spec)


def build(run: Writing) -> tuple[dict[str, jax.Array], Digests]:
    """Returns the state to save, and the digests of its values in every dtype."""
    state, digests = {}, {dtype: [] for dtype in DTYPES}
    sharding = sharding_of("same", WORKLOADS[run.workload].layers)
    for name, values in zip(names_of(run), values_of(run), strict=True):
        for dtype in DTYPES:
            digests[dtype].append(digest_of(values.astype(jnp.dtype(dtype), copy=False)))
        state[name] = jax.device_put(values, sharding, may_alias=False)
        state[name].block_until_ready()
    return state, digests


def wanted(run: Reading) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what to ask for."""
    sharding = sharding_of(run.target, WORKLOADS[run.workload].layers)
    leaf = jax.ShapeDtypeStruct(shape_of(run), jnp.dtype(run.dtype), sharding=sharding)
    return dict.fromkeys(names_of(run), leaf)


def wrong(run: Reading, restored: dict[str, jax.Array], digests: Digests) -> list[str]:
    """Names the leaves that are not what was asked for, or hold other bits on any device."""
    targets, found = wanted(run), []
    if list(restored) != list(targets):
        return ["the names of the leaves"]
    for (name, target), digest in zip(targets.items(), digests[run.dtype], strict=True):
        leaf = restored[name]
        is_asked_for = (leaf.shape, leaf.dtype) == (target.shape, target.dtype)
        is_asked_for = is_asked_for and leaf.sharding == target.sharding
        if not is_asked_for or digest_of(whole_of(leaf)) != digest:
            found.append(name)
    return found


def whole_of(leaf: jax.Array) -> np.ndarray | None:
    """Returns a whole leaf; `None` where replicas differ or a part is missing.

    It is put together in memory of its own: asking JAX for the whole would keep a copy with it.
    """
    whole, filled = np.zeros(leaf.shape, leaf.dtype), np.zeros(leaf.shape, bool)
    for shard in leaf.addressable_shards:
        values = np.asarray(shard.data)
        if filled[shard.index].any() and values.tobytes() != whole[shard.index].tobytes():
            return None
        whole[shard.index], filled[shard.index] = values, True
    return whole if filled.all() else None


def digest_of(values: np.ndarray | None) -> str:
    if values is None:
        return ""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(values).view(np.uint8))


def bytes_of(state: Any) -> int:
    """The host memory that a state takes; what several shards share counts once."""
    shards = (shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    on_host = [shard.data for shard in shards if shard.device.platform == "cpu"]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in on_host}.values())
