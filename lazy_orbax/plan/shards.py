"""How one leaf is divided between devices, replicas and processes. Pure: no arrays, no files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazy_orbax.plan.boxes import Shape

Device = Any
"""A `jax.Device`, which type checkers take for a variable."""
PINNED_HOST = "pinned_host"
"""JAX's name of host memory that devices copy to by themselves."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf as the plan sees it.

    Attributes:
        position: its index in `jax.tree.leaves(item)`.
        name: Orbax's parameter name, which is also its path in the checkpoint.
        keypath: how `jax.tree_util.keystr` writes its path, for messages.
        shape: global shape of what is stored.
        dtype: dtype of what is stored.
        sharding: sharding of what is stored, or `None` for a leaf in host memory.
        is_given: whether it is a snapshot in pinned host memory already, of what was there.
    """

    position: int
    name: str
    keypath: str
    shape: Shape
    dtype: np.dtype
    sharding: jax.sharding.Sharding | None
    is_given: bool = False


def is_key(array: jax.Array) -> bool:
    """Whether an array is of typed PRNG keys, whose data is what is stored."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaPolicy:
    """Which replicas of a shard write it. The fields are those of Orbax's `ArrayHandler`.

    Attributes:
        replica_id: the replica that writes a shard alone; `None`: each process writes all of its
            own shards once (directories that are not shared).
        parallel: replicas share the writing where the shard divides, unless `replica_id` is
            `None`.
        min_slice_bytes: no sharing where a share would be smaller than this, in bytes.
        max_replicas: at most so many replicas share.
    """

    replica_id: int | None = 0
    parallel: bool = True
    min_slice_bytes: int = 0
    max_replicas: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a leaf that this process writes.

    Attributes:
        device: index of the device that has it, in the sharding's device order.
        start: where it starts in the global array.
        shard_start: where the shard it belongs to starts in the global array.
    """

    device: int
    start: Shape
    shard_start: Shape


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How one leaf is divided between devices and processes.

    Attributes:
        write_shape: shape of every region; Orbax makes it the chunk shape unless told otherwise.
        share_axis: the axis along which replicas share a shard, or `None`.
        replica_ids: the replica number of each device, in the sharding's device order.
        replicated: whether some shard is on more than one device.
        holds_whole_shards: whether this process writes all of each shard that it writes of, and
            not a share of it.
        regions: what this process writes.
        processes: every process that writes something of the leaf.
    """

    write_shape: Shape
    share_axis: int | None
    replica_ids: tuple[int, ...]
    replicated: bool
    holds_whole_shards: bool
    regions: tuple[Region, ...]
    processes: frozenset[int]


def layout_of(leaf: Leaf, policy: ReplicaPolicy, process_index: int) -> Layout:
    """Divides one leaf, for one process.

    Args:
        leaf: the leaf; it has at least one element.
        policy: which replicas write.
        process_index: the process. Process 0 writes leaves in host memory.
    """
    if leaf.sharding is None:
        origin = (0,) * len(leaf.shape)
        regions = (Region(0, origin, origin),) if process_index == 0 else ()
        return Layout(leaf.shape, None, (), False, True, regions, frozenset())
    return _layout(leaf.sharding, leaf.shape, leaf.dtype.itemsize, policy, process_index)


@functools.lru_cache(maxsize=4096)
def _layout(
    sharding: jax.sharding.Sharding,
    shape: Shape,
    itemsize: int,
    policy: ReplicaPolicy,
    process_index: int,
) -> Layout:
    shard_shape = sharding.shard_shape(shape)
    devices, starts = [], []
    for device, index in sharding.devices_indices_map(shape).items():
        devices.append(device)
        starts.append(tuple(part.start or 0 for part in index))
    seen: dict[Shape, int] = {}
    replica_ids = []
    for start in starts:
        replica_ids.append(seen.get(start, 0))
        seen[start] = replica_ids[-1] + 1
    n_replicas = max(replica_ids) + 1
    axis, n_shares = _sharing(sharding, shard_shape, n_replicas, itemsize, policy)
    write_shape = _divided(shard_shape, axis, n_shares)
    local = [i for i, device in enumerate(devices) if device.process_index == process_index]
    mine = {starts[i]: i for i in reversed(local)}  # The first local replica of each shard.
    regions = []
    for i in local:
        if policy.replica_id is None:
            writes_alone = mine[starts[i]] == i
        else:
            writes_alone = replica_ids[i] == policy.replica_id
        if axis is None and writes_alone:
            regions.append(Region(i, starts[i], starts[i]))
        elif axis is not None and replica_ids[i] < n_shares:
            start = list(starts[i])
            start[axis] += replica_ids[i] * write_shape[axis]
            regions.append(Region(i, tuple(start), starts[i]))
    shares = collections.Counter(region.shard_start for region in regions)
    processes = frozenset(
        device.process_index
        for device, replica in zip(devices, replica_ids, strict=True)
        if (policy.replica_id in (None, replica) if axis is None else replica < n_shares)
    )
    return Layout(
        write_shape,
        axis,
        tuple(replica_ids),
        replicated=n_replicas > 1,
        holds_whole_shards=set(shares.values()) <= {n_shares},
        regions=tuple(regions),
        processes=processes,
    )


def _sharing(
    sharding: jax.sharding.Sharding,
    shard_shape: Shape,
    n_replicas: int,
    itemsize: int,
    policy: ReplicaPolicy,
) -> tuple[int | None, int]:
    """Returns the axis along which replicas share a shard, and how many share.

    The rule is Orbax's, so that the chunk grid on disk is the one stock Orbax would choose.
    """
    n_shares = n_replicas if policy.max_replicas is None else min(n_replicas, policy.max_replicas)
    if not policy.parallel or policy.replica_id is None or n_shares <= 1:
        return None, 1
    # Stock Orbax does not slice small arrays in pinned host memory, for their layout.
    if sharding.memory_kind == PINNED_HOST and not (
        len(shard_shape) >= 2 and math.prod(shard_shape) % 1024 == 0 and shard_shape[-1] % 128 == 0
    ):
        return None, 1
    for axis, size in enumerate(shard_shape):
        if size % n_shares == 0:
            share_bytes = math.prod(shard_shape) // n_shares * itemsize
            return (axis, n_shares) if share_bytes >= policy.min_slice_bytes else (None, 1)
    return None, 1


def _divided(shape: Shape, axis: int | None, by: int) -> Shape:
    return tuple(n // by if i == axis else n for i, n in enumerate(shape))
