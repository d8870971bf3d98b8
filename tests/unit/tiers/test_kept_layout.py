"""The layout has a place for each piece, and names what cannot be kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment.kept import plan_of
from equipment.trees import on_mesh

from lazy_orbax.errors import TreeError
from lazy_orbax.tiers import kept_layout
from lazy_orbax.tiers.kept_layout import has_all_here, layout_of, with_host_leaves
from lazy_orbax.tiers.snapshot_file import PAGE_BYTES


def test_pieces_have_room_and_none_overlaps(mesh):
    tree = {"a": on_mesh(np.zeros((8, 6), np.float32), mesh, "a"), "n": 3, "b": jnp.ones(5)}
    plan = plan_of(tree)
    layout = layout_of(plan, tree)
    spots = sorted(layout.spots.values(), key=lambda spot: spot.offset)
    assert len(spots) == sum(len(slab.pieces) for slab in plan.slabs)
    assert spots[0].offset == PAGE_BYTES
    for one, other in zip(spots, [*spots[1:], None], strict=True):
        end = layout.end if other is None else other.offset
        assert one.offset % 64 == 0
        assert one.offset + one.n_bytes <= end
    assert sum(spot.n_bytes for spot in spots) == plan.n_bytes
    assert layout.file_bytes({}) >= layout.end + len(layout.text)
    assert layout_of(plan, tree) is layout  # Made once.


def test_what_is_no_array_is_told_of():
    tree = {"s": "text", "none": None, "empty": [], "n": 1.5, "k": [jnp.ones(2)]}
    told = json.loads(layout_of(plan_of(tree), tree).text)
    assert told["texts"] == [["s", [[2, "s"]]]]
    assert sorted(told["empty"]) == [[[[2, "empty"]], "List"], [[[2, "none"]], "None"]]
    kinds = {leaf[0]: leaf[4] for leaf in told["leaves"]}
    assert kinds == {"k.0": "array", "n": "float"}


@pytest.mark.parametrize("character", ["\u2028", "\N{GRINNING FACE}"])
def test_a_text_of_any_size_has_room(character):
    layout = layout_of(plan_of({"a": jnp.ones(2)}), {"a": jnp.ones(2)})
    texts = {"s": character * 10**5}
    assert layout.file_bytes(texts) > layout.end + len(json.dumps(texts))


def test_what_only_a_type_handler_can_save_is_refused():
    tree = {"a": jnp.ones(2), "z": object()}
    plan = plan_of({"a": jnp.ones(2)})
    with pytest.raises(TreeError, match="z: object"):
        layout_of(plan, tree).refuse_others()


def test_a_share_of_a_replicated_leaf_is_not_all_of_it(mesh):
    tree = {"a": on_mesh(np.zeros((8, 8), np.float32), mesh), "n": 3}
    assert has_all_here(plan_of(tree), 0)
    other = plan_of(tree)
    few = other.slabs[0].__class__(**{**vars(other.slabs[0]), "pieces": other.slabs[0].pieces[1:]})
    assert not has_all_here(type(other)(other.leaves, other.layouts, (few,)), 0)


def test_what_a_plan_has_is_looked_at_once(mesh, monkeypatch):
    """It takes time for each leaf, in the thread that trains."""
    plan = plan_of({"a": on_mesh(np.zeros((8, 8), np.float32), mesh)})
    assert has_all_here(plan, 0)
    monkeypatch.setattr(kept_layout, "_elements_here", None)
    assert has_all_here(plan, 0)


def test_every_process_keeps_what_is_in_host_memory(mesh):
    tree = {"n": 3, "w": np.ones(4)}
    first = plan_of(tree)
    assert with_host_leaves(first, 0, slab_bytes=2**20) is first
    nothing = type(first)(first.leaves, first.layouts, ())
    found = with_host_leaves(nothing, 1, slab_bytes=2**20)
    assert has_all_here(found, 1)
    assert found.n_bytes == first.n_bytes


def test_each_shard_is_brought_to_a_tier_by_one_process(mesh, monkeypatch):
    found = []
    tree = {"n": 3, "a": on_mesh(np.zeros((8, 6)), mesh, "a"), "r": on_mesh(np.zeros(3), mesh)}
    tree |= {f"r{i}": on_mesh(np.zeros(3), mesh) for i in range(3)}
    # As if the devices were those of two processes, each with a part of all replicas.
    holders = kept_layout._holders
    monkeypatch.setattr(
        kept_layout, "_holders", lambda *leaf: dict.fromkeys(holders(*leaf), (0, 1))
    )
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(json.loads(layout_of(plan_of(tree), tree).text)["own"])
    leaves = [leaf.name for leaf in plan_of(tree).leaves]
    assert sorted((leaves[i], *start) for each in found for i, start in each) == sorted(
        [("n",), *(("a", row, 0) for row in (0, 2, 4, 6)), *((f"r{i}", 0) for i in ("", 0, 1, 2))]
    )
    assert all(len(each) > 1 for each in found)  # They take turns.
