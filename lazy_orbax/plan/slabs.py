"""Pure planning: which process writes what, from which slab, at which offset.

No array and no file is touched here. A *slab* is one packed buffer per device: the parts of many
leaves, one after the other. A *piece* is the part of one leaf in one device's buffer: a rectangle
of the leaf, contiguous in the buffer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lazy_orbax.plan.boxes import Shape, index_of
from lazy_orbax.plan.runs import runs
from lazy_orbax.plan.shards import Device, Layout, Leaf, ReplicaPolicy, layout_of

Kind = Literal["mesh", "shards", "host", "given"]
_T = TypeVar("_T")

# Leaves a slab may hold: XLA's compile time of the pack grows with the number of its operands.
_MOST_LEAVES = 256
# In a packed slab every device carries a part of every leaf. A replicated leaf that does not
# divide by its replicas is carried whole by each of them, which is only bearable when small.
_LARGEST_REPEATED_BYTES = 64 * 2**10
# An index that a program computes has 32 bits, unless the caller lets JAX have integers of 64. So
# no program has an operand or, on one device, a result of more elements: every index fits.
MOST_INDEXED = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A region of a leaf in one device's buffer of a slab.

    Attributes:
        leaf: index into `Plan.leaves`.
        device: index of the device in `Slab.mesh`, or in the leaf's sharding for `shards`.
        offset: first element in the packed buffer (first byte for `host`).
        start: where the region starts in the global array.
        shape: shape of the region.
        shard_start: where the shard it belongs to starts in the global array.
    """

    leaf: int
    device: int
    offset: int
    start: Shape
    shape: Shape
    shard_start: Shape

    @property
    def index(self) -> tuple[slice, ...]:
        """The region as an index into the global array."""
        return index_of(self.start, self.shape)

    @property
    def index_in_shard(self) -> tuple[slice, ...]:
        """The region as an index into its shard."""
        return index_of(self.start, self.shape, self.shard_start)

    @property
    def start_in_shard(self) -> Shape:
        """Where the region starts in its shard."""
        return tuple(part.start for part in self.index_in_shard)


@dataclasses.dataclass(frozen=True, eq=False)
class Slab:
    """Leaves that are copied and written together.

    Attributes:
        kind: `mesh`: packed on every device of `mesh` by one program; `shards`: copied shard by
            shard; `host`: copied from NumPy arrays and scalars; `given`: not copied, for the
            arrays are snapshots already.
        leaves: indices into `Plan.leaves`.
        cuts: for `mesh`, per leaf `None` (the whole shard is packed) or the axis and the size of
            the share of each replica.
        pieces: what this process writes.
        n_bytes: host memory that the slab takes in this process, in bytes.
        device_bytes: memory that staging takes on each device, in bytes.
        mesh: the devices, for `mesh`.
    """

    kind: Kind
    leaves: tuple[int, ...]
    cuts: tuple[tuple[int, int] | None, ...]
    pieces: tuple[Piece, ...]
    n_bytes: int
    device_bytes: int
    mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything about a save that does not depend on the values or on the directory."""

    leaves: tuple[Leaf, ...]
    layouts: tuple[Layout, ...]
    slabs: tuple[Slab, ...]
    kept: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    """What was made for the plan once, as programs: of no use without it, it goes when it goes."""

    @functools.cached_property
    def processes(self) -> frozenset[int]:
        """Every process that writes some of the arrays."""
        return frozenset().union(*(layout.processes for layout in self.layouts))

    @functools.cached_property
    def n_bytes(self) -> int:
        """Bytes that this process writes, before compression."""
        return sum(
            math.prod(piece.shape) * self.leaves[piece.leaf].dtype.itemsize
            for slab in self.slabs
            for piece in slab.pieces
        )


def make_plan(
    leaves: Sequence[Leaf], policy: ReplicaPolicy, *, process_index: int, slab_bytes: int
) -> Plan:
    """Divides `leaves` into slabs and pieces for one process.

    Over all processes, the pieces of a leaf cover each of its elements exactly once (once per
    process where `policy.replica_id` is `None`).

    Args:
        leaves: what to save; no leaf may have zero elements.
        policy: which replicas write.
        process_index: the process to plan for. Process 0 writes the leaves in host memory.
        slab_bytes: most bytes of a slab over this process's devices, unless one leaf has more. A
            packed slab has at most `MOST_INDEXED` elements on each device, whatever this is.
    """
    layouts = tuple(layout_of(leaf, policy, process_index) for leaf in leaves)
    groups: dict[tuple[Kind, jax.sharding.Mesh | None, np.dtype | None], list[int]] = {}
    for i, (leaf, layout) in enumerate(zip(leaves, layouts, strict=True)):
        kind, mesh = _route(leaf, layout)
        carrier = carrier_of(leaf.dtype) if kind == "mesh" else None
        groups.setdefault((kind, mesh, carrier), []).append(i)
    slabs = []
    # What is given fills the host budget without asking: after the others, which would wait for it.
    in_order = sorted(groups.items(), key=lambda group: group[0][0] == "given")
    for (kind, mesh, carrier), members in in_order:
        devices = [] if mesh is None else mesh.devices.flat
        n_local = sum(device.process_index == process_index for device in devices)
        if mesh is not None and n_local == 0:
            continue
        carried = {i: _carried_bytes(leaves[i], layouts[i], kind, n_local) for i in members}
        most_bytes = slab_bytes
        if carrier is not None:
            most_bytes = min(slab_bytes, MOST_INDEXED * carrier.itemsize * n_local)
        for run in runs(members, carried.__getitem__, most_bytes, _MOST_LEAVES):
            slabs.append(_make_slab(kind, mesh, run, leaves, layouts, n_local))
    return Plan(tuple(leaves), layouts, tuple(slabs))


def carrier_of(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which a leaf travels in a packed slab.

    Small floats travel as integers of their width, for XLA may compute with larger ones when it
    copies them, which changes some NaNs. Integers of one width travel together, and what has less
    than a byte each travels in a byte each. Everything else travels as it is: a change of type
    costs a copy in between.
    """
    if (dtype.kind in "cf" and dtype.itemsize >= 4) or dtype.kind == "b":
        return dtype
    return np.dtype(f"uint{8 * dtype.itemsize}")


def bits_of(dtype: np.dtype) -> int:
    """Returns the bits that one integer or float has on a device."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return jnp.iinfo(dtype).bits


def _route(leaf: Leaf, layout: Layout) -> tuple[Kind, jax.sharding.Mesh | None]:
    """Returns how a leaf is copied, and the mesh of the program that packs it."""
    sharding = leaf.sharding
    if sharding is None:
        return "host", None
    if leaf.is_given:
        return "given", None
    device = next(iter(sharding.device_set))
    if sharding.memory_kind not in (None, device.default_memory().kind):
        return "shards", None
    if math.prod(sharding.shard_shape(leaf.shape)) > MOST_INDEXED:
        return "shards", None
    repeated = layout.replicated and layout.share_axis is None
    shard_bytes = math.prod(layout.write_shape) * leaf.dtype.itemsize
    if repeated and shard_bytes > _LARGEST_REPEATED_BYTES:
        return "shards", None
    if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.axis_names:
        return "mesh", sharding.mesh  # type: ignore[return-value]
    if len(sharding.device_set) == 1:
        return "mesh", mesh_of_one(device)
    return "shards", None


@functools.cache
def mesh_of_one(device: Device) -> jax.sharding.Mesh:
    """Returns the mesh of one device."""
    return jax.sharding.Mesh(np.array([device]), ("device",))


def _carried_bytes(leaf: Leaf, layout: Layout, kind: Kind, n_local: int) -> int:
    """Returns the host memory that a leaf takes in its slab in this process."""
    copies = n_local if kind == "mesh" else len(layout.regions)
    n_bytes = math.prod(layout.write_shape) * leaf.dtype.itemsize * copies
    return n_bytes if kind == "mesh" else _aligned(n_bytes)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64


def _make_slab(
    kind: Kind,
    mesh: jax.sharding.Mesh | None,
    members: Sequence[int],
    leaves: Sequence[Leaf],
    layouts: Sequence[Layout],
    n_local: int,
) -> Slab:
    pieces: list[Piece] = []
    cuts: list[tuple[int, int] | None] = []
    offset = n_bytes = 0
    for i in members:
        layout = layouts[i]
        axis, shape = layout.share_axis, layout.write_shape
        for region in layout.regions:
            pieces.append(Piece(i, region.device, offset, region.start, shape, region.shard_start))
        cuts.append(None if axis is None else (axis, shape[axis]))
        carried = _carried_bytes(leaves[i], layout, kind, n_local)
        n_bytes += carried
        offset += math.prod(shape) if kind == "mesh" else carried
    device_bytes = n_bytes // n_local if kind == "mesh" else n_bytes
    return Slab(kind, tuple(members), tuple(cuts), tuple(pieces), n_bytes, device_bytes, mesh)
