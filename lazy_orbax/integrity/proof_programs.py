"""Programs that find the fingerprints of parts of arrays, each on the device that holds it.

They take nothing from the pack and its plan: JAX is asked where the shards of an array lie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lazy_orbax._jax_context import neutral
from lazy_orbax.integrity.fingerprint import u64
from lazy_orbax.integrity.fingerprint_traced import (
    Stretch,
    as_integers,
    of_traced,
    weights_traced,
)
from lazy_orbax.integrity.proof_subjects import Subject, starts_in_shards
from lazy_orbax.plan.shards import Device, Shape

# Leaves of one program. More that look alike would be compiled for fewer calls, which are cheap.
_MOST_ALIKE, _MOST_LEAVES = 4, 16


@dataclasses.dataclass(frozen=True)
class _Look:
    """How a program looks at a leaf: leaves that look alike can take each other's place.

    Attributes:
        shape: of the array that the program is given.
        dtype: its dtype.
        spec: how it is divided over the mesh.
        part: the shape of what is read on each device, if that is not all.
    """

    shape: Shape
    dtype: np.dtype
    spec: PartitionSpec
    part: Shape | None


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One call of a program.

    Attributes:
        mesh: devices of this process.
        leaves: indices of the leaves that it looks at.
        program: what is called.
        starts: its first argument: for each device, and for leaves whose parts start alike, where
            those start in the shard and in the leaf.
        places: row and column of each part's fingerprint in what is returned, by its key.
    """

    mesh: Mesh
    leaves: tuple[int, ...]
    program: Any
    starts: jax.Array
    places: Mapping[Hashable, tuple[int, int]]


def compiled(subjects: Mapping[int, Subject]) -> Iterator[Run]:
    """Compiles programs, few for many leaves, and yields the calls that look at all leaves.

    Args:
        subjects: the leaves, by their index among the arrays that `enqueue` will be given.

    Raises:
        Misplaced: a device does not hold the part that it is said to hold.
    """
    programs: dict[Hashable, Any] = {}
    tables: dict[Hashable, jax.Array] = {}
    for mesh, looks, leaves in _batches(subjects):
        starts, columns, places = _starts(mesh, [subjects[i] for i in leaves])
        content, kind = (mesh, starts.shape, starts.tobytes()), (mesh, looks, columns)
        with _exact(mesh):
            if content not in tables:
                tables[content] = _on_devices(mesh, starts)
            if kind not in programs:
                programs[kind] = _compiled(mesh, looks, columns, tables[content])
        yield Run(mesh, leaves, programs[kind], tables[content], places)


def enqueue(runs: Iterable[Run], arrays: Sequence[Any]) -> list[tuple[Run, jax.Array]]:
    """Enqueues the programs. The arrays may be donated, deleted or dropped when this returned."""
    enqueued = []
    for run in runs:
        with _exact(run.mesh):
            operands = [_operand(arrays[i], run.mesh) for i in run.leaves]
            enqueued.append((run, run.program(run.starts, *operands)))
    return enqueued


def results(enqueued: Iterable[tuple[Run, jax.Array]]) -> dict[Hashable, int]:
    """Waits for the devices, and returns the fingerprints of the parts by their keys."""
    found: dict[Hashable, int] = {}
    for run, result in enqueued:
        with neutral():
            rows = {shard.index[0].start or 0: shard.data for shard in result.addressable_shards}
            words = np.concatenate([np.asarray(rows[i]) for i in sorted(rows)]).astype(np.uint64)
        whole = words[..., 0] | words[..., 1] << np.uint64(32)
        found |= {key: int(whole[place]) for key, place in run.places.items()}
    return found


@contextlib.contextmanager
def _exact(mesh: Mesh) -> Iterator[None]:
    """Runs a program of ours, which counts in 64 bits, whatever the caller has set.

    It returns no floats, so JAX may look for NaNs: it finds none.
    """
    with neutral(), jax.set_mesh(mesh):
        yield


def _batches(
    subjects: Mapping[int, Subject],
) -> Iterator[tuple[Mesh, tuple[_Look, ...], tuple[int, ...]]]:
    """Divides leaves among calls: first those that look alike, then what is left over."""
    alike: dict[tuple[Mesh, _Look], list[int]] = {}
    for i, subject in subjects.items():
        alike.setdefault(_look(subject), []).append(i)
    rest: dict[Mesh, list[tuple[_Look, int]]] = {}
    for (mesh, look), members in alike.items():
        whole = len(members) // _MOST_ALIKE * _MOST_ALIKE
        for first in range(0, whole, _MOST_ALIKE):
            yield mesh, (look,) * _MOST_ALIKE, tuple(members[first : first + _MOST_ALIKE])
        rest.setdefault(mesh, []).extend((look, i) for i in members[whole:])
    for mesh, left in rest.items():
        for first in range(0, len(left), _MOST_LEAVES):
            looks, members = zip(*left[first : first + _MOST_LEAVES], strict=True)
            yield mesh, looks, members


def _look(subject: Subject) -> tuple[Mesh, _Look]:
    sharding = subject.sharding
    shard_shape = tuple(sharding.shard_shape(subject.shape))
    part = subject.part_shape if subject.part_shape != shard_shape else None
    if _is_ready(sharding):
        return sharding.mesh, _Look(subject.shape, subject.dtype, sharding.spec, part)  # type: ignore[attr-defined]
    devices = sorted(sharding.addressable_devices, key=lambda device: device.id)
    return _mesh_of(tuple(devices)), _Look(shard_shape, subject.dtype, PartitionSpec(), part)


def _is_ready(sharding: jax.sharding.Sharding) -> bool:
    """Whether a program of this process alone can take arrays that are placed so."""
    is_named = isinstance(sharding, NamedSharding) and bool(sharding.mesh.axis_names)
    return is_named and sharding.is_fully_addressable


@functools.lru_cache(maxsize=64)
def _mesh_of(devices: tuple[Device, ...]) -> Mesh:
    return Mesh(np.array(devices), ("device",))


def _operand(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns an array that a program on `mesh` can take, whose shards are the array's own.

    Where it is a new one it is declared to be replicated, which it need not be: each device brings
    the shard that it has.
    """
    is_ready = _is_ready(array.sharding)
    # A program for weak types, or for arrays that may go to any device, would be another one.
    if is_ready and not array.weak_type:
        return array
    data = {shard.device: shard.data for shard in array.addressable_shards}
    if is_ready:
        shape, sharding = array.shape, array.sharding
        return jax.make_array_from_single_device_arrays(shape, sharding, list(data.values()))
    shards = [data[device] for device in mesh.devices.flat]
    anyhow = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_single_device_arrays(shards[0].shape, anyhow, shards)


def _starts(
    mesh: Mesh, subjects: Sequence[Subject]
) -> tuple[np.ndarray, tuple[int, ...], dict[Hashable, tuple[int, int]]]:
    """Returns `Run.starts`, still on the host, its column for each leaf, and `Run.places`."""
    row_of = {device: row for row, device in enumerate(mesh.devices.flat)}
    n_axes = max(len(subject.shape) for subject in subjects)
    known: dict[bytes, int] = {}
    tables, columns = [], []
    places: dict[Hashable, tuple[int, int]] = {}
    for i, subject in enumerate(subjects):
        table = np.zeros((len(row_of), 2, n_axes), np.int64)
        for part, within in starts_in_shards(subject):
            row = row_of[part.device]
            table[row, :, : len(subject.shape)] = within, part.start
            places[part.key] = row, i
        columns.append(known.setdefault(table.tobytes(), len(tables)))
        if columns[-1] == len(tables):
            tables.append(table)
    return np.stack(tables, axis=1), tuple(columns), places


def _on_devices(mesh: Mesh, table: np.ndarray) -> jax.Array:
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(table.shape, sharding, lambda index: table[index])


def _compiled(
    mesh: Mesh, looks: tuple[_Look, ...], columns: tuple[int, ...], starts: jax.Array
) -> Any:
    """Returns a program of `starts` and leaves: for each device, two words for each leaf."""

    def look_at(starts: Any, *shards: Any) -> Any:
        found: list[Any] = []
        known: dict[Hashable, list[Stretch]] = {}
        for shard, look, column in zip(shards, looks, columns, strict=True):
            within, start = starts[0, column, 0, : shard.ndim], starts[0, column, 1, : shard.ndim]
            shard = as_integers(shard)
            if look.part is not None:
                shard = lax.dynamic_slice(shard, list(within), look.part)
            alike = column, shard.shape, shard.dtype
            if alike not in known:
                known[alike] = weights_traced(shard.shape, shard.dtype, start)
            found.append(of_traced(shard, known[alike]))
        both = jnp.stack(found)
        halves = both & u64(2**32 - 1), both >> u64(32)
        return jnp.stack(halves, axis=1).astype(jnp.uint32)[None]

    by_device = PartitionSpec(mesh.axis_names)
    specs = (by_device, *(look.spec for look in looks))
    mapped = jax.shard_map(look_at, mesh=mesh, in_specs=specs, out_specs=by_device, check_vma=False)
    places = [NamedSharding(mesh, spec) for spec in specs]
    jitted = jax.jit(mapped, in_shardings=tuple(places), out_shardings=places[0])
    stand_ins = [
        jax.ShapeDtypeStruct(look.shape, look.dtype, sharding=place)
        for look, place in zip(looks, places[1:], strict=True)
    ]
    jitted.lower(starts, *stand_ins).compile()  # It is found again when it is called.
    return jitted
