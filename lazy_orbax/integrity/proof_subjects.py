"""What is proven: parts of leaves, on which devices they lie, and whether they cover a leaf."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lazy_orbax.plan.shards import Device, Leaf, Shape
from lazy_orbax.plan.slabs import Piece, Plan, Slab


class Misplaced(ValueError):
    """Something is said of a leaf that is not so.

    Attributes:
        leaf: its name.
    """

    def __init__(self, leaf: str, what: str):
        super().__init__(what)
        self.leaf = leaf


class Part(NamedTuple):
    """A rectangle of a leaf that one device of this process holds.

    Attributes:
        key: what its fingerprint will be found under.
        device: the device.
        start: where it starts in the leaf.
    """

    key: Hashable
    device: Device
    start: Shape


@dataclasses.dataclass(frozen=True)
class Subject:
    """A leaf on devices, and the parts to look at: at most one a device, all of one shape.

    Attributes:
        name: for messages.
        shape: the leaf's.
        dtype: the leaf's.
        sharding: the leaf's.
        part_shape: the parts'.
        parts: the parts.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    sharding: jax.sharding.Sharding
    part_shape: Shape
    parts: tuple[Part, ...]


def starts_in_shards(subject: Subject) -> list[tuple[Part, Shape]]:
    """Returns the parts of a leaf, and where each starts in the shard that its device holds.

    Raises:
        Misplaced: a device does not hold the part that it is said to hold.
    """
    found = []
    where = subject.sharding.devices_indices_map(subject.shape)
    for part in subject.parts:
        index = where.get(part.device, ())
        shard = [axis.indices(n) for axis, n in zip(index or (), subject.shape, strict=False)]
        within = tuple(at - axis[0] for at, axis in zip(part.start, shard, strict=False))
        sizes = zip(within, subject.part_shape, shard, strict=False)
        fits = all(at >= 0 and at + n <= axis[1] - axis[0] for at, n, axis in sizes)
        if not fits or len(within) != len(subject.shape):
            raise Misplaced(subject.name, f"{part.device} does not hold the part at {part.start}")
        found.append((part, within))
    return found


@functools.lru_cache(maxsize=4096)
def is_in_host_memory(sharding: jax.sharding.Sharding) -> bool:
    """Whether NumPy can read arrays that are placed so where they are."""
    return all(device.platform == "cpu" for device in sharding.device_set)


def subjects_of(plan: Plan) -> tuple[dict[int, Subject], dict[int, Subject]]:
    """Returns the leaves to look at, with the pieces of them that this process writes.

    Returns:
        Those that programs look at; those that the host can read. By their number in the plan.
    """
    parts: dict[int, list[Part]] = {}
    shapes: dict[int, Shape] = {}
    for slab in plan.slabs:
        for piece in slab.pieces if slab.kind in ("mesh", "shards") else ():
            device = _device_of(slab, plan.leaves[piece.leaf], piece)
            parts.setdefault(piece.leaf, []).append(Part(id(piece), device, piece.start))
            shapes[piece.leaf] = piece.shape
    far, near = {}, {}
    for i, some in parts.items():
        leaf = plan.leaves[i]
        assert leaf.sharding is not None
        memory = some[0].device.default_memory().kind
        if leaf.sharding.memory_kind in (None, memory):
            about = leaf.name, leaf.shape, leaf.dtype, leaf.sharding
            subjects = near if is_in_host_memory(leaf.sharding) else far
            subjects[i] = Subject(*about, shapes[i], tuple(some))
    return far, near


def _device_of(slab: Slab, leaf: Leaf, piece: Piece) -> Device:
    if slab.mesh is not None:
        return slab.mesh.devices.flat[piece.device]
    assert leaf.sharding is not None
    return list(leaf.sharding.devices_indices_map(leaf.shape))[piece.device]


def check_cover(plan: Plan) -> None:
    """Looks whether the pieces cover each leaf that is all here, exactly once.

    Raises:
        Misplaced: they do not.
    """
    pieces: dict[int, list[Piece]] = {}
    for slab in plan.slabs:
        for piece in slab.pieces:
            pieces.setdefault(piece.leaf, []).append(piece)
    for i, leaf in enumerate(plan.leaves):
        mine = pieces.get(i, [])
        if leaf.sharding is None and not mine:
            continue  # Another process writes it.
        if leaf.sharding is not None and not leaf.sharding.is_fully_addressable:
            continue  # Other processes write the rest.
        if not _is_grid(leaf.shape, mine):
            raise Misplaced(leaf.name, f"its {len(mine)} pieces do not cover it exactly once")


def _is_grid(shape: Shape, pieces: Sequence[Piece]) -> bool:
    """Whether pieces of one shape fill each cell of a grid over the leaf once."""
    shapes = {piece.shape for piece in pieces}
    if len(shapes) != 1:
        return False
    (cell,) = shapes
    axes = [range(0, n, step) for n, step in zip(shape, cell, strict=True)]
    fits = not any(n % step for n, step in zip(shape, cell, strict=True))
    starts = {piece.start for piece in pieces}
    on_grid = all(at in axis for start in starts for at, axis in zip(start, axes, strict=True))
    return fits and on_grid and len(starts) == len(pieces) == math.prod(map(len, axes))
