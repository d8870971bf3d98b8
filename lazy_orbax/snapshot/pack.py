"""The program that packs many leaves into one buffer per device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lazy_orbax.plan.shards import Leaf, Shape
from lazy_orbax.plan.slabs import Plan, Slab, bits_of, carrier_of
from lazy_orbax.snapshot.programs import PROGRAMS, Program, shared

# On each device.
_LEAST_ALONE_BYTES = 2**19


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A packed slab's memory: what a program may write into again.

    Attributes:
        sharding: over this process's devices of the slab's mesh, in one dimension.
        dtype: in which the leaves travel.
        size: elements over those devices.
    """

    sharding: NamedSharding
    dtype: np.dtype
    size: int

    def fresh(self) -> jax.Array:
        """Allocates one."""
        return _zeros(self)()


def _zeros(buffer: Buffer) -> Program:
    def make() -> Program:
        return Program(
            jax.jit(lambda: jnp.zeros((buffer.size,), buffer.dtype), out_shardings=buffer.sharding),
            (),
        )

    return shared(buffer, make)


def buffer_of(plan: Plan, slab: Slab) -> Buffer:
    """Returns what the program of a slab writes into."""
    if (found := plan.kept.get(slab)) is None:
        buffer = _buffer_of(plan, slab)
        found = plan.kept[slab] = (buffer, _zeros(buffer))
    return found[0]


def _buffer_of(plan: Plan, slab: Slab) -> Buffer:
    assert slab.mesh is not None
    dtype = carrier_of(plan.leaves[slab.leaves[0]].dtype)
    each = sum(math.prod(plan.layouts[i].write_shape) for i in slab.leaves)
    mesh = local_mesh(slab.mesh)
    return Buffer(
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)), dtype, each * mesh.devices.size
    )


def program(plan: Plan, slab: Slab, *, into: bool) -> tuple[Program, jax.Array]:
    """Returns the program that packs a slab on `local_mesh`, and its first argument.

    The program takes the table and the `operands` of the slab, and returns one array of one
    dimension: on each device, its parts of the leaves one after the other.

    Args:
        plan: the plan that `slab` is from.
        slab: a slab of kind `mesh`.
        into: whether the program takes one more argument, after the table: memory to write into,
            which it donates.
    """
    if (found := plan.kept.get((slab, into))) is None:
        found = plan.kept[slab, into] = _program(plan, slab, into)
    return found


def compile_ahead(plan: Plan, slab: Slab) -> None:
    """Compiles what `stage` runs for a slab in host memory, so that it need not wait for that."""
    assert slab.mesh is not None
    buffer_of(plan, slab)
    with jax.set_mesh(local_mesh(slab.mesh)):
        program(plan, slab, into=True)[0].compiled()
        plan.kept[slab][1].compiled()


def is_compiled(plan: Plan, slab: Slab) -> bool:
    """Whether `stage` would only enqueue programs, for a slab in host memory."""
    if not PROGRAMS:
        return False  # The first save of a process: to make them, only to ask, takes milliseconds.
    buffer_of(plan, slab)
    needed: list[Program] = [program(plan, slab, into=True)[0], plan.kept[slab][1]]
    return all(one.is_compiled for one in needed)


def _program(plan: Plan, slab: Slab, into: bool) -> tuple[Program, jax.Array]:
    assert slab.mesh is not None
    leaves = [plan.leaves[i] for i in slab.leaves]
    shardings = [leaf.sharding for leaf in leaves]
    specs = tuple(s.spec if isinstance(s, NamedSharding) else PartitionSpec() for s in shardings)
    cuts, table = _replica_table(plan, slab)
    mesh = local_mesh(slab.mesh)
    is_local = mesh is slab.mesh
    if not is_local:
        specs = (PartitionSpec(),) * len(specs)
    kinds = [(leaf.shape if is_local else _shard_shape(leaf), leaf.dtype) for leaf in leaves]
    look = (mesh, specs, cuts, into, tuple(kinds))

    def make() -> Program:
        places = [NamedSharding(mesh, spec) for spec in specs]
        stand_ins = [_stand_in(table.shape, table.dtype, table.sharding)]
        if into:
            buffer = buffer_of(plan, slab)
            stand_ins.append(_stand_in((buffer.size,), buffer.dtype, buffer.sharding))
        for (shape, dtype), place in zip(kinds, places, strict=True):
            stand_ins.append(_stand_in(shape, dtype, place))
        return Program(_packer(mesh, specs, cuts, into), stand_ins)

    return shared(look, make), table


def _stand_in(shape: Shape, dtype: np.dtype, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _shard_shape(leaf: Leaf) -> Shape:
    assert leaf.sharding is not None
    return leaf.sharding.shard_shape(leaf.shape)


@functools.lru_cache(maxsize=1024)
def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Returns the mesh of this process's devices: `mesh` itself, if it has no others.

    A program over the devices of several processes would have to be run by all of them: they would
    have to agree on every save, slab by slab, also when one of them fails.
    """
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return mesh if len(local) == mesh.size else jax.sharding.Mesh(np.array(local), ("device",))


def operands(slab: Slab, leaves: Sequence[Any]) -> list[jax.Array]:
    """Returns what the program of a slab packs.

    Args:
        slab: a slab of kind `mesh`.
        leaves: the arrays of the plan's leaves, in order.
    """
    assert slab.mesh is not None
    arrays, mesh = [leaves[i] for i in slab.leaves], local_mesh(slab.mesh)
    if mesh is slab.mesh:
        return arrays
    anyhow = NamedSharding(mesh, PartitionSpec())
    return [_local(array, anyhow) for array in arrays]


def _local(array: jax.Array, anyhow: NamedSharding) -> jax.Array:
    """Returns this process's shards as an array of their shape.

    It is declared to be replicated, which it is not: each device brings its own shard, of any
    number of dimensions, to the program that packs it, and nothing else ever sees it.
    """
    if array.is_fully_replicated:  # Then `addressable_data` is the first shard, whatever is asked.
        shards = [shard.data for shard in array.addressable_shards]
    else:
        shards = [array.addressable_data(i) for i in range(anyhow.mesh.size)]
    return jax.make_array_from_single_device_arrays(shards[0].shape, anyhow, shards)


def _packer(
    mesh: jax.sharding.Mesh,
    specs: tuple[PartitionSpec, ...],
    cuts: tuple[tuple[int, int, int] | None, ...],
    into: bool,
) -> Any:
    """Returns the program that packs leaves with these specs."""
    every_axis = PartitionSpec(mesh.axis_names)

    def pack(table: jax.Array, *shards: jax.Array) -> jax.Array:
        parts = []
        for shard, cut in zip(shards[into:], cuts, strict=True):
            part = carried(shard)  # Before anything else is done with it.
            if cut is not None:
                axis, size, column = cut
                # It fits, for no shard has more than `MOST_INDEXED` elements. Their sum might not,
                # which JAX would compute to allow for a negative start.
                start = table[0, column] * size
                part = jax.lax.dynamic_slice_in_dim(
                    part, start, size, axis, allow_negative_indices=False
                )
            parts.append(part.reshape(-1))
        changed = map(_changes, shards[into:])
        return _joined_in(shards[0], parts, tuple(changed)) if into else jnp.concatenate(parts)

    in_specs = (PartitionSpec(mesh.axis_names, None), *[every_axis] * into, *specs)
    mapped = jax.shard_map(
        pack, mesh=mesh, in_specs=in_specs, out_specs=every_axis, check_vma=False
    )
    # The output's is said again, because under a mesh that mixes axis types JAX would infer a part
    # of it; the inputs', so that it does not matter whether they are committed to their devices.
    place = functools.partial(NamedSharding, mesh)
    given = {"in_shardings": tuple(map(place, in_specs)), "out_shardings": place(every_axis)}
    if into:  # Kept, for it is aliased to the output also where nothing reads it.
        return jax.jit(mapped, donate_argnums=1, keep_unused=True, **given)
    return jax.jit(mapped, **given)


def _joined_in(buffer: jax.Array, parts: Sequence[jax.Array], changed: Sequence[bool]) -> jax.Array:
    """Writes the parts into the buffer, one after the other. `changed` are of another type before.

    Where the type of many parts changes, XLA for CPU copies them all before it joins them, at a
    fifth of the speed. A part by itself it just writes, but takes ten milliseconds to compile that.
    """
    runs: list[list[jax.Array]] = []
    alone = True
    for part, is_changed in zip(parts, changed, strict=True):
        was_alone, alone = alone, is_changed and part.nbytes >= _LEAST_ALONE_BYTES
        if alone or was_alone:
            runs.append([])
        runs[-1].append(part)
    if len(runs) == 1 and not alone:  # Aliased to the buffer, though nothing reads that.
        return jnp.concatenate(parts)
    start = 0
    for run in runs:
        joined = jnp.concatenate(run)
        buffer = jax.lax.dynamic_update_slice(buffer, joined, (start,))
        start += joined.size
    return buffer


def _changes(shard: jax.Array) -> bool:
    return carrier_of(shard.dtype) != shard.dtype


def carried(shard: jax.Array) -> jax.Array:
    """Reinterprets numbers as integers of whole bytes, as NumPy has them.

    XLA may change the NaNs of floats that it copies or cuts, and cannot join all numbers that have
    less than a byte each.
    """
    if not _changes(shard):
        return shard
    integers = getattr(jnp, f"uint{bits_of(shard.dtype)}")
    return jax.lax.bitcast_convert_type(shard, integers).astype(carrier_of(shard.dtype))


@functools.partial(jax.jit, static_argnames=("start", "shape"))
def share_of(shard: jax.Array, start: Shape, shape: Shape) -> jax.Array:
    """Returns a rectangle of a shard, `carried`.

    Its bounds are part of the program, which has 64 bits for them: as arguments they would have 32.

    Args:
        shard: on one device.
        start: where the rectangle starts in the shard.
        shape: its shape.
    """
    end = tuple(a + n for a, n in zip(start, shape, strict=True))
    return jax.lax.slice(carried(shard), start, end)


@functools.lru_cache(maxsize=1024)
def _cached_table(mesh: jax.sharding.Mesh, columns: tuple[tuple[int, ...], ...]) -> jax.Array:
    table = np.array(columns, dtype=np.int32).reshape(len(columns), mesh.devices.size).T
    local = local_mesh(mesh)
    if local is not mesh:
        mine = set(local.devices.flat)
        table = table[[device in mine for device in mesh.devices.flat]]
    sharding = NamedSharding(local, PartitionSpec(local.axis_names, None))
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
    unread = (0,) * slab.mesh.devices.size
    return tuple(cuts), _cached_table(slab.mesh, tuple(columns) or (unread,))
