"""What the system is asked to read ahead, and when a restore asks for it."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.storage import page_cache
from lazy_orbax.trust import malformed


@pytest.fixture
def advised(monkeypatch):
    """What was asked for: offset and length of a file, by its path."""
    found = {}

    def advise(descriptor, offset, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        found[os.readlink(f"/proc/self/fd/{descriptor}")] = (offset, length)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def start_to_fill(directory, sizes):
    for name, size in sizes.items():
        with (directory / name).open("wb") as file:
            file.truncate(size)
    return page_cache.start_to_fill(str(directory), sizes)


def test_files_are_read_ahead_in_order_up_to_a_limit(tmp_path, monkeypatch, advised):
    monkeypatch.setattr(page_cache, "_MOST_BYTES", 3 * 2**24)
    sizes = {"b": 2**24, "a": 2**25 + 1, "c": 2**24}
    assert start_to_fill(tmp_path, sizes).result() is None
    assert advised == {str(tmp_path / "b"): (0, 2**24), str(tmp_path / "a"): (0, 2**25)}


def test_a_few_bytes_are_not_worth_it(tmp_path, advised):
    start_to_fill(tmp_path, {"a": 2**24 - 1}).result()
    assert not advised


def test_what_is_wrong_with_a_file_is_not_found_here(tmp_path, advised):
    (tmp_path / "there").touch()
    page_cache.start_to_fill(str(tmp_path), {"gone": 2**24, "there": 5}).result()
    assert advised == {str(tmp_path / "there"): (0, 5)}


@pytest.fixture
def saved(tmp_path):
    state = {"a": jax.numpy.arange(4096.0), "b": jax.numpy.ones(4096)}
    handler = lazy_orbax.LazyCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "item", args=lazy_orbax.args.LazySave(state))
    return tmp_path / "item", handler, state


@pytest.mark.parametrize(
    ("change", "is_all"),
    [
        ({}, True),
        ({"partial_restore": True}, False),
        ({"item": {"a": ..., "b": np.ones(4096)}}, False),
        ({"item": None}, False),
    ],
    ids=["all", "part", "placeholder", "no target"],
)
def test_data_is_read_ahead_if_all_of_it_is_wanted(saved, monkeypatch, change, is_all):
    directory, _, state = saved
    asked = []
    monkeypatch.setattr(page_cache, "_LEAST_BYTES", 0)
    monkeypatch.setattr(page_cache, "_fill", lambda _, sizes: asked.append(sizes))
    with malformed.checked(directory, ocp.args.PyTreeRestore(**{"item": state} | change)):
        pass
    data = {str(p.relative_to(directory)): p.stat().st_size for p in directory.rglob("d/*")}
    assert len(data) > 1
    assert asked == [data if is_all else {}]


def test_a_restore_ends_no_sooner_than_its_reading_ahead(saved, monkeypatch):
    directory, handler, state = saved
    ended = []
    monkeypatch.setattr(page_cache, "_LEAST_BYTES", 0)
    monkeypatch.setattr(page_cache, "_fill", lambda *_: ended.append(True))
    args = ocp.checkpoint_utils.construct_restore_args(state)
    restored = handler.restore(directory, args=lazy_orbax.args.LazyRestore(state, args))
    assert ended == [True]
    np.testing.assert_array_equal(restored["a"], state["a"])
