"""Device to host: puts the bytes of a slab out of reach of donation, and brings them to the host.

The promise: when `stage` or `direct` returned, the caller may donate, delete or drop its arrays at
once. PJRT runs a donating execution after every read that was enqueued before it, so an enqueued
copy is enough and nobody waits. No view of the caller's arrays is ever held: on CPU a view would
make the next donating step copy instead of alias, and on GPU refuse to run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax._jax_context import neutral, shielded
from lazy_orbax.plan.shards import Device
from lazy_orbax.plan.slabs import Piece, Plan, Slab, mesh_of_one
from lazy_orbax.snapshot import host_copies
from lazy_orbax.snapshot.pack import Buffer, buffer_of, local_mesh, operands, program, share_of
from lazy_orbax.snapshot.pack_on_host import packed_on_host

# Held while a buffer is donated: it is deleted before or after, and not half of it.
_DONATING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Held:
    """A slab whose bytes are out of reach of donation.

    Attributes:
        slab: its plan.
        arrays: our own copies: one packed array, or one array per source shard, or one NumPy
            buffer. They die when the write of the slab has committed.
        sources: for arrays that are not packed: per piece, which of `arrays` has its shard.
        on_host: whether `arrays` already count as host memory.
        buffer: the packed array, where the next save may write into its memory.
    """

    slab: Slab
    arrays: tuple[Any, ...]
    sources: tuple[int, ...] | None
    on_host: bool
    buffer: jax.Array | None = None


@functools.partial(jax.profiler.annotate_function, name="lazy_orbax snapshot")
def take(
    plan: Plan, slab: Slab, leaves: Sequence[Any], mode: str, buffer: jax.Array | None = None
) -> Held:
    """Puts a slab out of reach of donation, by the mode that `Room` chose.

    Args:
        plan: the plan that `slab` is from.
        slab: what to copy.
        leaves: the values of `plan.leaves`, in order. They may be donated, deleted or changed
            when this returned.
        mode: `host`, `stage`, `copy`, `direct` or `in_step`.
        buffer: for `stage`, a buffer of the kind `reusable` that nobody uses any more.
    """
    if mode == "stage":
        return stage(plan, slab, leaves, buffer)
    ways = {"host": copy_host, "copy": copy, "direct": direct, "in_step": given}
    return ways[mode](plan, slab, leaves)


def reusable(plan: Plan, slab: Slab) -> Buffer | None:
    """Returns the kind of buffer that staging a slab may write into, where that is host memory.

    Device memory is given back instead: the next step may need it.
    """
    return buffer_of(plan, slab) if is_in_host_memory(slab) else None


@shielded
def stage(plan: Plan, slab: Slab, leaves: Sequence[Any], buffer: jax.Array | None = None) -> Held:
    """Copies a slab on its devices: one program, one packed buffer per device.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh`.
        leaves: the arrays of `plan.leaves`, in order. They may be donated when this returned.
        buffer: a buffer of the kind `reusable`, which is donated.
    """
    assert slab.mesh is not None
    kind = reusable(plan, slab)
    mine = operands(slab, leaves)
    pack, table = program(plan, slab, into=kind is not None)
    with jax.set_mesh(local_mesh(slab.mesh)):
        if kind is None:
            return Held(slab, (pack(table, *mine),), None, on_host=False)
        # The buffer dies when the program is enqueued; its memory lives on as `packed`.
        fresh = kind.fresh() if buffer is None else buffer
        with _DONATING:
            packed = pack(table, fresh, *mine)
    return Held(slab, (packed,), None, on_host=True, buffer=packed)


@shielded
def copy(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Copies a slab that is in host memory as `stage` does, without its program. It waits for that.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh`, on CPU devices.
        leaves: the arrays of `plan.leaves`, in order. They may be donated when this returned.
    """
    return Held(slab, (packed_on_host(plan, slab, leaves),), None, on_host=True)


@shielded
def direct(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Sends the shards of a slab straight to host memory, each distinct one once.

    Where the backend has pinned host memory this only enqueues; elsewhere it waits for the copy.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh` or `shards`.
        leaves: the arrays of `plan.leaves`, in order. They may be donated when this returned.
    """
    arrays, sources = _sources(plan, slab, leaves, cut=True)
    return Held(slab, tuple(host_copies.enqueue(arrays)), tuple(sources), on_host=True)


def given(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Keeps the shards of a slab, which are snapshots in pinned host memory, as they are.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `given`.
        leaves: the arrays of `plan.leaves`, in order. They may be dropped, but not donated or
            deleted, when this returned.
    """
    # No copy: it is the caller's snapshot. What we hold of it dies when its write has committed.
    arrays, sources = _sources(plan, slab, leaves, cut=False)
    return Held(slab, tuple(arrays), tuple(sources), on_host=True)


def _sources(
    plan: Plan, slab: Slab, leaves: Sequence[Any], *, cut: bool
) -> tuple[list[jax.Array], list[int]]:
    """Returns the arrays that hold the pieces of a slab, each once, and for each piece which.

    Where other processes write a part of a shard, `cut` leaves that part out.
    """
    copied: dict[tuple[Any, ...], int] = {}
    arrays: list[jax.Array] = []
    sources = []
    for piece in slab.pieces:
        layout = plan.layouts[piece.leaf]
        if not layout.replicated:
            key: tuple[Any, ...] = (piece.leaf,)
        elif layout.holds_whole_shards:
            key = (piece.leaf, piece.shard_start)
        else:
            key = (piece.leaf, piece.start)
        if key not in copied:
            copied[key] = len(arrays)
            array = leaves[piece.leaf]
            if layout.replicated:
                device = _device_of(plan, piece)
                array = next(s.data for s in array.addressable_shards if s.device == device)
                if cut and not layout.holds_whole_shards:
                    with jax.set_mesh(mesh_of_one(device)):  # Other processes write the rest.
                        array = share_of(array, piece.start_in_shard, piece.shape)
            arrays.append(array)
        sources.append(copied[key])
    return arrays, sources


def _device_of(plan: Plan, piece: Piece) -> Device:
    leaf = plan.leaves[piece.leaf]
    assert leaf.sharding is not None
    return _devices_of(leaf.sharding, leaf.shape)[piece.device]


@functools.lru_cache(maxsize=4096)
def _devices_of(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(sharding.devices_indices_map(shape))


def copy_host(plan: Plan, slab: Slab, leaves: Sequence[Any]) -> Held:
    """Copies NumPy arrays and scalars into one buffer.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `host`.
        leaves: the values of `plan.leaves`, in order. They may be changed when this returned.
    """
    buffer = np.empty(slab.n_bytes, dtype=np.uint8)
    for piece in slab.pieces:
        # The plan wants the byte order of this machine: what is stored tells none.
        np.copyto(_host_view(plan, piece, buffer), leaves[piece.leaf], casting="equiv")
    return Held(slab, (buffer,), None, on_host=True)


def _host_view(plan: Plan, piece: Piece, buffer: np.ndarray) -> np.ndarray:
    dtype = plan.leaves[piece.leaf].dtype
    n_bytes = math.prod(piece.shape) * dtype.itemsize
    return buffer[piece.offset : piece.offset + n_bytes].view(dtype).reshape(piece.shape)


@neutral()
@functools.partial(jax.profiler.annotate_function, name="lazy_orbax to the host")
def to_host(held: Held) -> Held:
    """Brings a slab to host memory and waits for it. Its device memory is free after that."""
    arrays = held.arrays
    if held.slab.kind == "host":
        return held
    if held.on_host:
        hosts = tuple(map(host_copies.shards_of, arrays))
    else:
        hosts = (host_copies.bring(arrays[0]),)
    return dataclasses.replace(held, arrays=hosts, on_host=True)


def await_arrival(array: jax.Array | None) -> None:
    """Waits until our own copy has arrived. One that is gone was written already."""
    try:
        jax.block_until_ready(array)
    except RuntimeError:
        # It is being used again, or was, or only seemed so while that was tried.
        with _DONATING:
            if array is not None and not array.is_deleted():
                jax.block_until_ready(array)


def views(plan: Plan, held: Held) -> list[tuple[Piece, np.ndarray]]:
    """Returns a zero-copy view of each piece of a slab that `to_host` returned.

    The views are of our own buffers and keep them alive.
    """
    slab = held.slab
    if slab.kind == "host":
        return [(piece, _host_view(plan, piece, held.arrays[0])) for piece in slab.pieces]
    found = []
    if held.sources is not None:
        for piece, source in zip(slab.pieces, held.sources, strict=True):
            shards = held.arrays[source]
            part = shards.get(_device_of(plan, piece), next(iter(shards.values())))
            part = part if part.shape == piece.shape else part[piece.index_in_shard]
            found.append((piece, part.view(plan.leaves[piece.leaf].dtype)))
        return found
    assert slab.mesh is not None
    devices = list(slab.mesh.devices.flat)
    for piece in slab.pieces:
        buffer = held.arrays[0][devices[piece.device]]
        n = math.prod(piece.shape)
        carried = buffer[piece.offset : piece.offset + n].reshape(piece.shape)
        found.append((piece, carried.view(plan.leaves[piece.leaf].dtype)))
    return found


def is_in_host_memory(slab: Slab) -> bool:
    """Whether what is staged for a slab is in host memory already, as on the CPU backend."""
    return slab.mesh is not None and slab.mesh.devices.flat[0].platform == "cpu"
