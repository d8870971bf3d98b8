"""What a plan says of leaves on devices, for programs that look whether that is so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lazy_orbax.integrity.proof_programs import Misplaced, Part, Subject
from lazy_orbax.plan.shards import Device, Leaf, Shape
from lazy_orbax.plan.slabs import Piece, Plan, Slab


def subjects_of(plan: Plan) -> dict[int, Subject]:
    """Returns the leaves that programs can look at, with the pieces that this process writes."""
    parts: dict[int, list[Part]] = {}
    shapes: dict[int, Shape] = {}
    for slab in plan.slabs:
        for piece in slab.pieces if slab.kind in ("mesh", "shards") else ():
            device = _device_of(slab, plan.leaves[piece.leaf], piece)
            parts.setdefault(piece.leaf, []).append(Part(id(piece), device, piece.start))
            shapes[piece.leaf] = piece.shape
    subjects = {}
    for i, some in parts.items():
        leaf = plan.leaves[i]
        assert leaf.sharding is not None
        memory = some[0].device.default_memory().kind
        if leaf.sharding.memory_kind in (None, memory):
            about = leaf.name, leaf.shape, leaf.dtype, leaf.sharding
            subjects[i] = Subject(*about, shapes[i], tuple(some))
    return subjects


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
