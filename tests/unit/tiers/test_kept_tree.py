"""What is in memory becomes the tree that is wanted; what this machine lacks is named."""

import jax
import numpy as np
import pytest
from equipment.kept import plan_of
from equipment.trees import assert_same, on_mesh, random_array
from hypothesis import given
from hypothesis import strategies as st

from lazy_orbax.errors import CorruptCheckpointError, RestoreError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.plan.boxes import Box, index_of
from lazy_orbax.tiers.kept_layout import layout_of, view_in
from lazy_orbax.tiers.kept_tree import KeptTree, NotAtHandError
from lazy_orbax.tiers.snapshot_file import SnapshotError, SnapshotFile, read_snapshot
from lazy_orbax.timeline import RestoreRecorder

WHOSE = '{{"run": "r", "item": "i", "process": 0, "life": 1, '
FACTS = WHOSE + '"step": 1, "texts": {{}}, "digests": "{}"}}'


def kept(path, tree, *, only=lambda piece: True, facts=FACTS):
    """Writes a snapshot by hand, of the pieces that `only` takes."""
    plan = plan_of(tree)
    slabs = [
        type(slab)(**{**vars(slab), "pieces": tuple(filter(only, slab.pieces))})
        for slab in plan.slabs
    ]
    plan = type(plan)(plan.leaves, plan.layouts, tuple(slabs))
    layout = layout_of(plan, tree)
    path.touch()
    file = SnapshotFile(str(path), layout.file_bytes({}))
    digests = np.zeros(len(layout.spots), "<u8")
    values = {leaf.name: value for leaf, value in zip(plan.leaves, jax.tree.leaves(tree))}
    for piece in (piece for slab in plan.slabs for piece in slab.pieces):
        spot = layout.spots[id(piece)]
        whole = np.asarray(values[plan.leaves[piece.leaf].name])
        part = np.ascontiguousarray(whole[index_of(piece.start, piece.shape)])
        view_in(file.memory, spot)[:] = part.reshape(-1).view(np.uint8)
        digests[spot.index] = digest_of_bytes(view_in(file.memory, spot))
    file.seal(1, layout.text, facts.format(digests.tobytes().hex()).encode(), end=layout.end)
    return read_snapshot(str(path)), file, layout


def restored(snapshots, like, **keywords):
    return KeptTree(snapshots).restored(like, RestoreRecorder("memory"), **keywords)


@pytest.fixture
def tree(mesh):
    rng = np.random.default_rng(0)
    return {
        "w": on_mesh(random_array(rng, (16, 12), np.float32), mesh, "a", "b"),
        "v": on_mesh(random_array(rng, (32,), np.int16), mesh, ("a", "b")),
        "r": on_mesh(random_array(rng, (5, 3), np.uint8), mesh),
        "h": random_array(rng, (7,), np.float64),
    }


SPECS = [(), ("a",), ("b",), (("a", "b"),), (None, "b"), ("b", "a"), ("a", "b")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_any_sharding_is_served_where_all_bytes_are_at_hand(tmp_path, mesh, tree, spec):
    snapshot, *_ = kept(tmp_path / "f", tree)
    like = {**tree, "w": on_mesh(np.zeros((16, 12), np.float32), mesh, *spec)}
    found = restored([snapshot], like)
    assert_same(found, tree)
    assert found["w"].sharding == like["w"].sharding
    assert isinstance(found["h"], np.ndarray)


def test_what_was_restored_lives_on_when_the_memory_is_written_again(tmp_path, tree):
    snapshot, file, _ = kept(tmp_path / "f", tree)
    found = restored([snapshot], tree)
    file.memory[:] = 0
    assert_same(found, tree)


def test_each_flipped_bit_of_a_piece_is_found_and_the_leaf_named(tmp_path, mesh, tree):
    snapshot, file, layout = kept(tmp_path / "f", tree)
    for i, spot in enumerate(layout.spots.values()):
        file.memory[spot.offset + i % spot.n_bytes] ^= 1
        with pytest.raises(CorruptCheckpointError) as caught:
            restored([snapshot], tree)
        assert caught.value.leaf in tree
        assert len(caught.value.problems) == 1
        file.memory[spot.offset + i % spot.n_bytes] ^= 1
    assert_same(restored([snapshot], tree), tree)


def test_pieces_of_several_processes_make_one_tree_and_a_gap_is_named(tmp_path, tree):
    one, *_ = kept(tmp_path / "1", tree, only=lambda piece: sum(piece.start) % 8 == 0)
    other, *_ = kept(tmp_path / "2", tree, only=lambda piece: sum(piece.start) % 8 != 0)
    assert_same(restored([one, other], tree), tree)
    assert_same(restored([other, one, one], tree), tree)
    with pytest.raises(NotAtHandError, match=r"leaf w\["):
        restored([one], tree)


def test_a_target_that_does_not_fit_is_refused_leaf_by_leaf(tmp_path, tree):
    snapshot, *_ = kept(tmp_path / "f", tree)
    with pytest.raises(RestoreError, match="leaf w"):
        restored([snapshot], {**tree, "w": np.zeros((3, 3), np.float32)})
    with pytest.raises(RestoreError, match="leaf more"):
        restored([snapshot], {**tree, "more": np.zeros(3)})
    part = {"w": tree["w"]}
    with pytest.raises(RestoreError, match="leaf h: found it"):
        restored([snapshot], part)
    assert_same(restored([snapshot], part, is_part=True), part)


def test_another_dtype_is_cast(tmp_path, mesh):
    tree = {"w": on_mesh(np.arange(16, dtype=np.float32), mesh, "a")}
    snapshot, *_ = kept(tmp_path / "f", tree)
    like = {"w": on_mesh(np.zeros(16, np.int8), mesh, "b")}
    found = restored([snapshot], like)["w"]
    assert found.dtype == np.int8
    assert np.array_equal(found, np.arange(16))


def test_an_array_without_a_sharding_comes_to_the_default_device(tmp_path, tree):
    snapshot, *_ = kept(tmp_path / "f", tree)
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in tree.items()}
    found = restored([snapshot], like)
    assert_same(found, tree)
    assert found["w"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    "facts",
    [
        WHOSE + '"step": 1, "texts": {{}}, "digests": "00"}}',
        WHOSE + '"step": 1, "texts": {{}}, "digests": "{}00"}}',
        WHOSE + '"step": 1, "texts": 3, "digests": "{}"}}',
        WHOSE + '"step": 1}}',
    ],
)
def test_facts_that_make_no_sense_are_refused(tmp_path, tree, facts):
    snapshot, *_ = kept(tmp_path / "f", tree, facts=facts)
    with pytest.raises(SnapshotError, match="makes no sense"):
        KeptTree([snapshot])


def test_an_overlap_makes_up_for_no_gap(tmp_path):
    tree = {"w": np.arange(4, dtype=np.float32)}
    snapshot, *_ = kept(tmp_path / "f", tree)
    found = KeptTree([snapshot])
    (piece,) = found.pieces["w"].values()
    parts = [Box((0,), (2,)), Box((1,), (2,))]  # As many elements as there are, and not the last.
    found.pieces["w"] = {
        box: piece._replace(
            box=box,
            memory=(part := piece.memory[4 * box.start[0] :][:8]),
            digest=digest_of_bytes(part),
        )
        for box in parts
    }
    with pytest.raises(NotAtHandError, match=r"leaf w"):
        found.restored(tree, RestoreRecorder("memory"))


def test_a_leaf_that_two_processes_have_differently_is_refused(tmp_path, mesh):
    one, *_ = kept(tmp_path / "1", {"w": np.zeros(4, np.float32)})
    other, *_ = kept(tmp_path / "2", {"w": np.zeros(4, np.int32)})
    with pytest.raises(SnapshotError, match="another on another process"):
        KeptTree([one, other])


@given(st.data())
def test_a_change_of_any_layout_gives_an_error_and_no_array(tmp_path_factory, data):
    """The digest of the layout is right, as if the program that wrote it was wrong."""
    tree = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    path = tmp_path_factory.mktemp("layout") / "f"
    snapshot, *_ = kept(path, tree)
    piece = snapshot.layout["pieces"][0]
    which = data.draw(st.integers(0, 3))
    number = data.draw(st.integers(-(2**63), 2**63))
    piece[which] = number if which < 2 else [number, data.draw(st.integers(-5, 9))]
    try:
        found = restored([snapshot], tree)
    except (SnapshotError, CorruptCheckpointError, NotAtHandError):
        return
    assert_same(found, tree)


def test_the_shards_of_a_machine_are_made_whole_of_its_pieces(tmp_path, tree, mesh):
    tree["s"] = on_mesh(np.arange(16, dtype=np.int32), mesh, "a")  # Replicas have shares of shards.
    snapshot, file, layout = kept(tmp_path / "f", tree)
    found = KeptTree([snapshot])
    shapes, copies = found.shard_shapes(), found.own_copies()
    assert {name: shapes[name] for name in "wsrh"} == {
        "w": (4, 6),
        "s": (4,),
        "r": (5, 3),
        "h": (7,),
    }
    assert [box.start for box in copies["s"]] == [(0,), (4,), (8,), (12,)]
    for name, boxes in copies.items():
        assert {array.shape for array in boxes.values()} == {shapes[name]}
        for box, array in boxes.items():
            wanted = np.asarray(tree[name])[index_of(box.start, box.shape)]
            assert array.tobytes() == wanted.tobytes()
    like = found.stand_in()
    alike = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), like) == alike
    assert all(set(leaf.strides) <= {0} for leaf in jax.tree.leaves(like))  # It takes no memory.
    view_in(file.memory, next(iter(layout.spots.values())))[0] ^= 1
    with pytest.raises(CorruptCheckpointError, match="not those that were kept"):
        found.own_copies()


def test_a_shard_of_which_a_part_is_not_here_is_named(tmp_path, mesh):
    tree = {"s": on_mesh(np.arange(16, dtype=np.int32), mesh, "a")}
    snapshot, *_ = kept(tmp_path / "f", tree, only=lambda piece: piece.start != (2,))
    with pytest.raises(NotAtHandError, match="does not have leaf s"):
        KeptTree([snapshot]).own_copies()
