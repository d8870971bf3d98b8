"""How two checkpoints differ, with and without digests, and in numbers."""

from __future__ import annotations

import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.runs import state

import lazy_orbax
from lazy_orbax.errors import MalformedCheckpointError, OptionError
from lazy_orbax.inspection.diff import diff
from lazy_orbax.inspection.show import show


def found(a, b, **keywords):
    return {leaf.name: leaf.what for leaf in diff(a, b, **keywords).leaves}


@pytest.fixture
def save(tmp_path):
    """Saves trees, each as an item of its own, and returns where."""

    def save(name, tree, make=lazy_orbax.pytree_handler, **keywords):
        with ocp.Checkpointer(make(**keywords)) as checkpointer:
            checkpointer.save(tmp_path / name, args=ocp.args.PyTreeSave(tree))
        return tmp_path / name

    return save


def test_digests_tell_what_changed_without_reading(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lazy_orbax.inspection.values", None)
    changed = dict.fromkeys(("layer.bias", "layer.kernel", "n.0"), "values")
    assert found(runs / "lazy" / "1", runs / "lazy" / "2") == changed
    same = diff(runs / "lazy" / "1", runs / "torn" / "1")
    assert (same.ok, same.n_same, same.leaves) == (True, 4, ())


def test_without_digests_nothing_is_claimed_and_stats_read(runs):
    a, b = runs / "stock" / "1", runs / "stock" / "2"
    assert set(found(a, b).values()) == {"not compared"}
    assert not diff(a, a).ok
    assert found(a, b, stats=True) == found(runs / "lazy" / "1", runs / "lazy" / "2")
    assert diff(a, a, stats=True).ok
    # Other libraries, other formats, the same values.
    assert diff(runs / "lazy" / "2", runs / "v1" / "2", stats=True).ok
    assert diff(runs / "stock", runs / "lazy", stats=True).n_same == 4


def test_numbers_are_those_of_the_difference(runs):
    a, b = runs / "lazy" / "1", runs / "lazy" / "12"
    told = []
    leaves = {
        e.name: e for e in diff(a, b, stats=True, on_progress=lambda *n: told.append(n)).leaves
    }
    old, new = (np.asarray(state(step)["layer"]["kernel"], float) for step in (1, 12))
    kernel = leaves["layer.kernel"]
    assert (kernel.n_different, kernel.max_abs) == (32, 11.0)
    assert kernel.norm == pytest.approx(np.linalg.norm(new - old))
    assert kernel.relative == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old))
    done, total = zip(*told)
    assert sorted(done) == list(done)
    assert done[-1] == total[-1] == sum(e.n_bytes for e in leaves_of(a) if e.name in leaves)


def leaves_of(path):
    return show(path).items[0].leaves


def test_structure_comes_first(save):
    a = save("a", {"gone": jnp.ones(2), "kind": jnp.ones(2), "shape": jnp.ones(2), "text": "old"})
    b = save("b", {"new": jnp.ones(2), "kind": jnp.arange(2), "shape": jnp.ones(3), "text": "new"})
    difference = diff(a, b, stats=True)
    assert {leaf.name: (leaf.what, leaf.a, leaf.b) for leaf in difference.leaves} == {
        "gone": ("only in a", "float32[2]", ""),
        "new": ("only in b", "", "float32[2]"),
        "kind": ("type", "float32[2]", "int32[2]"),
        "shape": ("shape", "float32[2]", "float32[3]"),
        "text": ("values", "", ""),
    }


@pytest.mark.parametrize(
    ("a", "b", "n_different", "max_abs"),
    [
        ([1.0, np.nan], [1.0, np.nan], None, None),
        ([np.inf, 1.0], [np.inf, 2.0], 1, 1.0),
        ([0.0], [-0.0], 0, 0.0),
        ([np.nan, 1.0], [0.0, 1.0], 1, np.nan),
        ([True, False], [True, True], 1, 1.0),
        ([1 + 1j], [1 - 1j], 1, 2.0),
        ([2**63 - 1], [2**63 - 2], 1, 1.0),
    ],
)
def test_numbers_of_every_kind(save, a, b, n_different, max_abs):
    places = [
        save(name, {"x": np.array(each)}, ocp.PyTreeCheckpointHandler)
        for name, each in (("a", a), ("b", b))
    ]
    leaves = diff(*places, stats=True).leaves
    if n_different is None:
        assert leaves == ()
    else:
        assert leaves[0].n_different == n_different
        assert leaves[0].max_abs == pytest.approx(max_abs, nan_ok=True)


def test_large_leaves_are_compared_in_parts(save, monkeypatch):
    from lazy_orbax.inspection import values

    monkeypatch.setattr(values, "_PART_BYTES", 2**12)
    x = np.arange(2**14, dtype=np.float32).reshape(128, 128)
    a = save("a", {"x": x}, ocp.PyTreeCheckpointHandler, use_ocdbt=False)
    y = x.copy()
    y[100, 7] += 3
    b = save("b", {"x": y}, ocp.PyTreeCheckpointHandler)
    told = []
    (leaf,) = diff(a, b, stats=True, on_progress=lambda *n: told.append(n)).leaves
    assert (leaf.n_different, leaf.max_abs, leaf.norm) == (1, 3.0, 3.0)
    assert len(told) == 16


def test_digests_are_of_what_was_saved_and_values_of_what_is_stored(runs, tmp_path):
    a, b = tmp_path / "2", tmp_path / "12"
    for place in (a, b):
        shutil.copytree(runs / "corrupt" / place.name, place)
    assert diff(runs / "lazy" / "12", b, stats=True).ok
    assert found(runs / "stock" / "12", b, stats=True) == {"layer.kernel": "values"}
    (b / "default" / "layer.bias" / "0").write_bytes(b"")
    difference = diff(a, b, stats=True)
    assert [problem.leaf for problem in difference.problems] == ["layer.bias"]
    assert len(difference.leaves) == 3


def test_what_is_malformed_or_missing_is_refused(runs):
    with pytest.raises(MalformedCheckpointError):
        diff(runs / "stock" / "2", runs / "hostile" / "2")
    with pytest.raises(OptionError, match="holds runs"):
        diff(runs, runs / "lazy")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("_METADATA", '{"tree_metadata": 3}'),
        ("array_metadatas/process_0", '{"array_metadatas": 3}'),
    ],
)
def test_what_is_like_the_first_is_checked_where_it_differs(runs, tmp_path, file, content):
    a, b = runs / "lazy" / "1" / "default", tmp_path / "b"
    shutil.copytree(a, b)
    assert diff(a, b).ok
    (b / file).write_text(content)
    with pytest.raises(MalformedCheckpointError, match=file):
        diff(a, b)
    with pytest.raises(MalformedCheckpointError, match=file):
        diff(b, a)
