"""Device to host: puts the bytes of a slab out of reach of donation, and brings them to the host.

The promise: when `stage` or `direct` returned, the caller may donate, delete or drop its arrays at
once. PJRT runs a donating execution after every read that was enqueued before it, so an enqueued
copy is enough and nobody waits. No view of the caller's arrays is ever held: on CPU a view would
make the next donating step copy instead of alias, and on GPU refuse to run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lazy_orbax.layout import Device
from lazy_orbax.plan import Piece, Plan, Slab

_PINNED_HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Held:
    """A slab whose bytes are out of reach of donation.

    Attributes:
        slab: its plan.
        arrays: our own copies: one packed array, or one array per source shard, or one NumPy
            buffer. They die when the write of the slab has committed.
        sources: for arrays that are not packed: per piece, which of `arrays` has its shard.
        on_host: whether `arrays` already count as host memory.
    """

    slab: Slab
    arrays: tuple[Any, ...]
    sources: tuple[int, ...] | None
    on_host: bool


def take(plan: Plan, slab: Slab, leaves: Sequence[Any], mode: str) -> Held:
    """Puts a slab out of reach of donation, by the mode that `Room` chose.

    Args:
        plan: the plan that `slab` is from.
        slab: what to copy.
        leaves: the values of `plan.leaves`, in order. They may be donated, deleted or changed
            when this returned.
        mode: `host`, `stage` or `direct`.
    """
    return {"host": copy_host, "stage": stage, "direct": direct}[mode](plan, slab, leaves)


def stage(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Copies a slab on its devices: one program, one packed buffer per device.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh`.
        leaves: the arrays of `plan.leaves`, in order. They may be donated when this returned.
    """
    assert slab.mesh is not None
    pack, table = _program(plan, slab)
    with jax.set_mesh(slab.mesh):
        packed = pack(table, *[leaves[i] for i in slab.leaves])
    return Held(slab, (packed,), None, on_host=is_in_host_memory(slab))


@functools.lru_cache(maxsize=4096)
def _program(plan: Plan, slab: Slab) -> tuple[Any, jax.Array]:
    """Returns the program that packs a slab, and its first argument."""
    assert slab.mesh is not None
    shardings = [plan.leaves[i].sharding for i in slab.leaves]
    specs = tuple(s.spec if isinstance(s, NamedSharding) else PartitionSpec() for s in shardings)
    cuts, table = _replica_table(plan, slab)
    return _packer(slab.mesh, specs, cuts), table


@functools.lru_cache(maxsize=1024)
def _packer(
    mesh: jax.sharding.Mesh,
    specs: tuple[PartitionSpec, ...],
    cuts: tuple[tuple[int, int, int] | None, ...],
) -> Any:
    """Returns the program that packs leaves with these specs; slabs that look alike share it."""
    every_axis = PartitionSpec(mesh.axis_names)

    def pack(table: jax.Array, *shards: jax.Array) -> jax.Array:
        parts = []
        for shard, cut in zip(shards, cuts, strict=True):
            if cut is not None:
                axis, size, column = cut
                start = table[0, column] * size
                shard = jax.lax.dynamic_slice_in_dim(shard, start, size, axis)
            parts.append(shard.reshape(-1))
        return jnp.concatenate(parts)

    mapped = jax.shard_map(
        pack,
        mesh=mesh,
        in_specs=(PartitionSpec(mesh.axis_names, None), *specs),
        out_specs=every_axis,
        check_vma=False,
    )
    return jax.jit(mapped)


@functools.lru_cache(maxsize=1024)
def _cached_table(mesh: jax.sharding.Mesh, columns: tuple[tuple[int, ...], ...]) -> jax.Array:
    table = np.array(columns, dtype=np.int32).reshape(len(columns), mesh.devices.size).T
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))
    return jax.make_array_from_callback(table.shape, sharding, lambda index: table[index])


def _replica_table(
    plan: Plan, slab: Slab
) -> tuple[tuple[tuple[int, int, int] | None, ...], jax.Array]:
    """Returns the cuts with their column in the table, and the table of replica numbers.

    Row d of the table says which replica device d is, one column for each way of replicating.
    """
    assert slab.mesh is not None
    columns: dict[tuple[int, ...], int] = {}
    cuts: list[tuple[int, int, int] | None] = []
    for i, cut in zip(slab.leaves, slab.cuts, strict=True):
        if cut is None:
            cuts.append(None)
        else:
            column = columns.setdefault(plan.layouts[i].replica_ids, len(columns))
            cuts.append((*cut, column))
    if not columns:
        columns[(0,) * slab.mesh.devices.size] = 0
    return tuple(cuts), _cached_table(slab.mesh, tuple(columns))


def direct(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Sends the shards of a slab straight to host memory, each distinct one once.

    Where the backend has pinned host memory this only enqueues; elsewhere it waits for the copy.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh` or `shards`.
        leaves: the arrays of `plan.leaves`, in order. They may be donated when this returned.
    """
    copied: dict[tuple[int, Any], int] = {}
    arrays: list[jax.Array] = []
    targets: list[jax.sharding.Sharding] = []
    sources = []
    for piece in slab.pieces:
        whole = not plan.layouts[piece.leaf].replicated
        key = (piece.leaf, None if whole else piece.shard_start)
        if key not in copied:
            copied[key] = len(arrays)
            array = leaves[piece.leaf]
            if not whole:
                device = _device_of(plan, piece)
                array = next(s.data for s in array.addressable_shards if s.device == device)
            arrays.append(array)
            targets.append(_in_pinned_host(array.sharding))
        sources.append(copied[key])
    return Held(slab, tuple(_to_host(arrays, targets)), tuple(sources), on_host=True)


@functools.lru_cache(maxsize=4096)
def _in_pinned_host(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return sharding.with_memory_kind(_PINNED_HOST)


def _device_of(plan: Plan, piece: Piece) -> Device:
    leaf = plan.leaves[piece.leaf]
    assert leaf.sharding is not None
    return _devices_of(leaf.sharding, leaf.shape)[piece.device]


@functools.lru_cache(maxsize=4096)
def _devices_of(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(sharding.devices_indices_map(shape))


def _to_host(
    arrays: Sequence[jax.Array], targets: Sequence[jax.sharding.Sharding]
) -> Sequence[jax.Array]:
    """Enqueues copies of arrays to pinned host memory, or waits for them where there is none."""
    if not arrays:
        return ()
    # may_alias=False: an array that is in pinned host memory already would not be copied.
    if has_pinned_host(next(iter(arrays[0].sharding.device_set))):
        return jax.device_put(list(arrays), list(targets), may_alias=False)
    copies = jax.device_put(list(arrays), [a.sharding for a in arrays], may_alias=False)
    for copy in copies:
        copy.copy_to_host_async()
    return jax.block_until_ready(copies)


def copy_host(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Copies NumPy arrays and scalars into one buffer.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `host`.
        leaves: the values of `plan.leaves`, in order. They may be changed when this returned.
    """
    buffer = np.empty(slab.n_bytes, dtype=np.uint8)
    for piece in slab.pieces:
        np.copyto(_host_view(plan, piece, buffer), leaves[piece.leaf], casting="no")
    return Held(slab, (buffer,), None, on_host=True)


def _host_view(plan: Plan, piece: Piece, buffer: np.ndarray) -> np.ndarray:
    dtype = plan.leaves[piece.leaf].dtype
    n_bytes = int(np.prod(piece.shape, dtype=np.int64)) * dtype.itemsize
    return buffer[piece.offset : piece.offset + n_bytes].view(dtype).reshape(piece.shape)


def to_host(held: Held) -> Held:
    """Brings a slab to host memory and waits for it. Its device memory is free after that."""
    arrays = held.arrays
    if not held.on_host:
        (packed,) = arrays
        if has_pinned_host(packed.sharding.mesh.devices.flat[0]):
            arrays = (jax.device_put(packed, _in_pinned_host(packed.sharding)),)
        else:
            packed.copy_to_host_async()
    jax.block_until_ready(arrays)
    return dataclasses.replace(held, arrays=arrays, on_host=True)


def views(plan: Plan, held: Held) -> list[tuple[Piece, np.ndarray]]:
    """Waits for the copies of a slab and returns a zero-copy view of each piece.

    The views are of our own buffers and keep them alive.
    """
    slab = held.slab
    if slab.kind == "host":
        return [(piece, _host_view(plan, piece, held.arrays[0])) for piece in slab.pieces]
    if held.sources is not None:
        hosts = [
            {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
            for array in held.arrays
        ]
        found = []
        for piece, source in zip(slab.pieces, held.sources, strict=True):
            shards = hosts[source]
            whole = shards.get(_device_of(plan, piece), next(iter(shards.values())))
            found.append((piece, whole[piece.index_in_shard]))
        return found
    assert slab.mesh is not None
    order = {device: i for i, device in enumerate(slab.mesh.devices.flat)}
    buffers = {
        order[shard.device]: np.asarray(shard.data) for shard in held.arrays[0].addressable_shards
    }
    found = []
    for piece in slab.pieces:
        n = int(np.prod(piece.shape, dtype=np.int64))
        flat = buffers[piece.device][piece.offset : piece.offset + n]
        found.append((piece, flat.reshape(piece.shape)))
    return found


def is_in_host_memory(slab: Slab) -> bool:
    """Whether what is staged for a slab is in host memory already, as on the CPU backend."""
    return slab.mesh is not None and slab.mesh.devices.flat[0].platform == "cpu"


def has_pinned_host(device: Device) -> bool:
    """Whether copies to the host can be enqueued into pinned memory."""
    return any(memory.kind == _PINNED_HOST for memory in device.addressable_memories())
