"""The program that packs many leaves into one buffer per device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lazy_orbax.plan import Plan, Slab, carrier_of


@functools.lru_cache(maxsize=4096)
def program(plan: Plan, slab: Slab) -> tuple[Any, jax.Array]:
    """Returns the program that packs a slab, and its first argument.

    The program takes the table and the arrays of the slab's leaves, and returns one array of one
    dimension: on each device, its parts of the leaves one after the other.
    """
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
            parts.append(_carried(shard).reshape(-1))
        return jnp.concatenate(parts)

    mapped = jax.shard_map(
        pack,
        mesh=mesh,
        in_specs=(PartitionSpec(mesh.axis_names, None), *specs),
        out_specs=every_axis,
        check_vma=False,
    )
    # Said again, because under a mesh that mixes axis types JAX would infer a part of it.
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, every_axis))


def _carried(shard: jax.Array) -> jax.Array:
    """Reinterprets numbers as integers: XLA may change the NaNs of floats that it copies."""
    carrier = carrier_of(shard.dtype)
    if carrier == shard.dtype:
        return shard
    return jax.lax.bitcast_convert_type(shard, carrier)


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
