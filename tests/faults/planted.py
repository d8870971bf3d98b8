"""Errors to plant in the package, each of which makes a save store what was not in the arrays.

Each is a function of `monkeypatch`. Those in `BLIND` are ones that digests cannot see: they are
taken of what was packed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lazy_orbax.plan import slabs
from lazy_orbax.save import plan_cache
from lazy_orbax.snapshot import device_to_host, pack


def an_offset_that_is_one_too_large(monkeypatch: Any) -> None:
    """The host takes the pieces from one element further in the packed buffer."""
    _change_views(monkeypatch, lambda leaf, view, buffer: _further(view, buffer, 1))


def a_swapped_leaf(monkeypatch: Any) -> None:
    """The program packs two leaves that look alike in each other's place."""
    original = device_to_host.operands

    def swapped(slab: Any, leaves: Any) -> list[Any]:
        if len(slab.leaves) == 1:
            return original(slab, leaves)
        first, *rest, last = original(slab, leaves)
        alike = (first.shape, first.dtype) == (last.shape, last.dtype)
        return [last, *rest, first] if alike else [first, *rest, last]

    monkeypatch.setattr(device_to_host, "operands", swapped)


def a_wrong_replica(monkeypatch: Any) -> None:
    """Each replica packs the share of the next one."""
    original = pack._replica_table

    def rotated(a_plan: Any, slab: Any) -> Any:
        cuts, table = original(a_plan, slab)
        return cuts, jax.device_put(np.roll(np.asarray(table), 1, axis=0), table.sharding)

    monkeypatch.setattr(pack, "_replica_table", rotated)


def a_stale_slab(monkeypatch: Any) -> None:
    """From the second save on, the buffer of the first one is written again."""
    first: dict[int, Any] = {}
    original = device_to_host.stage

    def stage(a_plan: Any, slab: Any, leaves: Any, buffer: Any = None) -> Any:
        held = original(a_plan, slab, leaves, buffer)
        if id(slab) not in first:
            first[id(slab)] = np.array(held.arrays[0])
            return held
        before = jax.device_put(first[id(slab)], held.arrays[0].sharding)
        return dataclasses.replace(held, arrays=(before,), buffer=None)

    monkeypatch.setattr(device_to_host, "stage", stage)


def a_shifted_start(monkeypatch: Any) -> None:
    """The program packs each share one row too early."""
    original = jax.lax.dynamic_slice_in_dim

    def shifted(operand: Any, start: Any, size: int, axis: int = 0, **knobs: Any) -> Any:
        return original(operand, jax.numpy.maximum(start - 1, 0), size, axis, **knobs)

    class Lax:
        def __getattr__(self, name: str) -> Any:
            return shifted if name == "dynamic_slice_in_dim" else getattr(jax.lax, name)

    class Jax:
        lax = Lax()

        def __getattr__(self, name: str) -> Any:
            return getattr(jax, name)

    monkeypatch.setattr(pack, "jax", Jax())


def a_transposed_block(monkeypatch: Any) -> None:
    """A square piece is written with its axes in the wrong order."""
    square = lambda view: view.T.copy() if view.ndim == 2 and len(set(view.shape)) == 1 else view  # noqa: E731
    _change_views(monkeypatch, lambda leaf, view, buffer: square(view))


def a_wrong_type(monkeypatch: Any) -> None:
    """Floats are packed by their values and not by their bits."""

    def carried(shard: Any) -> Any:
        dtype = slabs.carrier_of(shard.dtype)
        return shard if dtype == shard.dtype else jax.numpy.abs(shard).astype(dtype)

    monkeypatch.setattr(pack, "carried", carried)


def a_piece_over_another(monkeypatch: Any) -> None:
    """The plan gives the second piece of a leaf the place of the first."""
    _change_plan(monkeypatch, lambda first, second: dataclasses.replace(second, start=first.start))


def a_lost_piece(monkeypatch: Any) -> None:
    """The plan leaves the second piece of a leaf out."""
    _change_plan(monkeypatch, lambda first, second: None)


def a_wrong_place(monkeypatch: Any) -> None:
    """TensorStore is told to write the first piece of a leaf where another one goes."""
    original = slabs.Piece.index.fget

    def index(piece: Any) -> Any:
        found = original(piece)
        if not found or piece.start[0] != 0:
            return found
        n = piece.shape[0]
        return (slice(n, 2 * n), *found[1:])

    monkeypatch.setattr(slabs.Piece, "index", property(index))


def a_view_of_another_piece(monkeypatch: Any) -> None:
    """The writer is handed the views of two pieces of one shape in each other's place."""
    original = device_to_host.views

    def views(a_plan: Any, held: Any) -> Any:
        found = original(a_plan, held)
        alike = [i for i, (piece, _) in enumerate(found) if piece.shape == found[0][0].shape]
        if len(alike) > 1:
            i, j = alike[:2]
            (a, x), (b, y) = found[i], found[j]
            found[i], found[j] = (a, y), (b, x)
        return found

    monkeypatch.setattr(device_to_host, "views", views)


def a_number_of_another_leaf(monkeypatch: Any) -> None:
    """Two leaves in host memory are copied in each other's place."""
    original = device_to_host.copy_host

    def copy_host(a_plan: Any, slab: Any, leaves: Any) -> Any:
        swapped = list(leaves)
        i, j = slab.leaves[:2]
        swapped[i], swapped[j] = leaves[j], leaves[i]
        return original(a_plan, slab, swapped)

    monkeypatch.setattr(device_to_host, "copy_host", copy_host)


def _further(view: np.ndarray, buffer: np.ndarray, by: int) -> np.ndarray:
    return np.roll(buffer.view(view.dtype).reshape(-1), -by)[: view.size].reshape(view.shape)


def _change_views(monkeypatch: Any, change: Any) -> None:
    original = device_to_host.views

    def views(a_plan: Any, held: Any) -> Any:
        if held.slab.kind != "mesh":
            return original(a_plan, held)
        return [
            (piece, change(a_plan.leaves[piece.leaf], view, np.array(view)))
            for piece, view in original(a_plan, held)
        ]

    monkeypatch.setattr(device_to_host, "views", views)


def _change_plan(monkeypatch: Any, change: Any) -> None:
    original = plan_cache.make_plan

    def make_plan(*args: Any, **keywords: Any) -> Any:
        made = original(*args, **keywords)
        slabs = []
        for slab in made.slabs:
            pieces = list(slab.pieces)
            for i in range(1, len(pieces)):
                if pieces[i].leaf == pieces[i - 1].leaf:
                    changed = change(pieces[i - 1], pieces[i])
                    pieces[i : i + 1] = [] if changed is None else [changed]
                    break
            slabs.append(dataclasses.replace(slab, pieces=tuple(pieces)))
        return dataclasses.replace(made, slabs=tuple(slabs))

    monkeypatch.setattr(plan_cache, "make_plan", make_plan)


BLIND = [
    an_offset_that_is_one_too_large,
    a_swapped_leaf,
    a_wrong_replica,
    a_stale_slab,
    a_shifted_start,
    a_transposed_block,
    a_wrong_type,
    a_view_of_another_piece,
    a_number_of_another_leaf,
]
OTHERS = [a_piece_over_another, a_lost_piece, a_wrong_place]
