"""Parts of an item are joined to an ordinary one, or refused."""

import os

import numpy as np
import pytest

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.plan.boxes import Box
from lazy_orbax.save.part import Attempt, join_parts, prepare_part, write_part

ATTEMPT = Attempt("0a", (0, 2))
CHUNKS = {"a": (2, 3), "b": (5,)}
SHAPES = {"a": (4, 3), "b": (5,)}
A, B = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(5, dtype=np.int8)
PIECES = {
    0: {"a": {Box((0, 0), (2, 3)): A[:2]}},
    2: {"a": {Box((2, 0), (2, 3)): A[2:]}, "b": {Box((0,), (5,)): B}},
}


@pytest.fixture
def item(tmp_path):
    os.mkdir(tmp_path / "item")
    return str(tmp_path / "item")


def written(item, part, attempt=ATTEMPT):
    settings = lazy_orbax.LazyCheckpointHandler().settings
    like = {"a": np.broadcast_to(np.float32(0), (4, 3)), "b": np.zeros(5, np.int8)}
    prepared = prepare_part(settings, like, CHUNKS, PIECES[part], item)
    return write_part(prepared, PIECES[part], item, attempt, part, {})


def test_parts_become_an_item(item):
    told = {part: written(item, part) for part in (2, 0)}
    written(item, 2, Attempt("late", (0, 2)))  # Of another attempt: in nobody's way.
    join_parts(item, ATTEMPT, told, SHAPES)
    written(item, 2, Attempt("later", (0, 2)))
    found = lazy_orbax.load(item)
    assert np.array_equal(found["a"], A)
    assert np.array_equal(found["b"], B)
    assert lazy_orbax.verify(item).is_whole


def test_a_part_that_is_not_there_or_is_another_is_refused(item):
    told = {0: written(item, 0), 2: 0}
    with pytest.raises(SaveError, match="part 2 is not what was written there"):
        join_parts(item, ATTEMPT, told, SHAPES)
    written(item, 2)
    with pytest.raises(SaveError, match="part 2 is not what was written there"):
        join_parts(item, ATTEMPT, told, SHAPES)
    assert not os.path.exists(f"{item}/manifest.ocdbt")


@pytest.mark.parametrize("gone", ["a", "b"])
def test_parts_that_are_not_all_of_a_leaf_are_refused(item, monkeypatch, gone):
    others = {name: pieces for name, pieces in PIECES[2].items() if name != gone}
    monkeypatch.setitem(PIECES, 2, others)
    told = {part: written(item, part) for part in (0, 2)}
    found, wanted = {"a": (6, 12), "b": (0, 5)}[gone]
    with pytest.raises(SaveError, match=f"leaf {gone}: found {found} of its {wanted} elements"):
        join_parts(item, ATTEMPT, told, SHAPES)
    assert not os.path.exists(f"{item}/manifest.ocdbt")
