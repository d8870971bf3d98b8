"""A snapshot in memory is what the state was at that step, and training never waits or fails."""

import os
import select
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.training import SLAB_BYTES, Steps, make_state, pointers
from equipment.trees import assert_same

import lazy_orbax
from lazy_orbax.errors import KeeperError, OptionError
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.tiers import slot
from lazy_orbax.tiers.kept_listing import kept as listing_of
from lazy_orbax.tiers.kept_tree import KeptTree
from lazy_orbax.tiers.snapshot_file import SnapshotError
from lazy_orbax.timeline import RestoreRecorder

OPTIONS = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES)


@pytest.fixture
def keeper(served, tmp_path):
    with lazy_orbax.Keeper(tmp_path, directory=served, options=OPTIONS) as keeper:
        yield keeper


def kept(keeper):
    """What is whole, by step."""
    found = [s for _, s in keeper.slots.shelf.snapshots() if not isinstance(s, SnapshotError)]
    return {snapshot.step: KeptTree([snapshot]) for snapshot in found}


def restored(keeper, step, like):
    return kept(keeper)[step].restored(like, RestoreRecorder("memory"))


def test_steps_that_donate_the_state_do_not_change_what_is_kept(keeper, mesh):
    state = make_state(mesh)
    steps, wanted = Steps(state), {}
    state = steps.donating(state)  # What came from NumPy may be NumPy's memory.
    for step in range(5):
        before = pointers(state)
        wanted[step] = steps.bytes_of(state)
        assert keeper.save(step, state)
        state = steps.donating(state)
        assert pointers(state) == before  # Nothing of ours kept donation from working.
        keeper.wait()
    assert keeper.report == lazy_orbax.reports.KeeperReport(kept=5, newest_step=4)
    assert sorted(kept(keeper)) == [3, 4]
    for step in (3, 4):
        assert_same(restored(keeper, step, state), wanted[step])


def test_one_copy_serves_memory_and_storage(served, tmp_path, mesh):
    state = make_state(mesh)
    with lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES, keeper=keeper)
        handler = lazy_orbax.standard_handler(options=options)
        with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
            manager.save(0, args=ocp.args.StandardSave(state))
            assert keeper.save(0, state)  # It is on its way already.
            manager.wait_until_finished()
            assert keeper.report.kept == 1
            stored = manager.restore(0, args=ocp.args.StandardRestore(state))
        assert_same(restored(keeper, 0, state), stored)


def test_what_is_saved_to_another_run_is_no_snapshot_of_this_one(served, tmp_path):
    """Such as a copy of the averaged weights, whose tree may look the same."""
    with lazy_orbax.Keeper(tmp_path / "run", directory=served) as keeper:
        handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(keeper=keeper))
        with ocp.CheckpointManager(tmp_path / "run" / "ema", item_handlers=handler) as manager:
            manager.save(7, args=ocp.args.StandardSave({"a": jnp.ones(3)}))
            manager.wait_until_finished()
        assert kept(keeper) == {}
        assert keeper.save(7, {"a": jnp.zeros(3)})
        keeper.wait()
        assert_same(restored(keeper, 7, {"a": jnp.ones(3)}), {"a": jnp.zeros(3)})


def test_while_one_is_copied_the_next_is_passed_over(keeper, monkeypatch):
    state, reached, opened = {"a": jnp.arange(8.0)}, threading.Event(), threading.Event()
    seal = slot.Slot.seal

    def held(*args):
        reached.set()
        assert opened.wait(60)
        return seal(*args)

    monkeypatch.setattr(slot.Slot, "seal", held)
    assert keeper.save(1, state)
    assert reached.wait(60)
    assert not keeper.save(2, state)
    opened.set()
    keeper.wait()
    assert keeper.save(3, state)
    keeper.wait()
    assert (keeper.report.kept, keeper.report.skipped) == (2, 1)
    assert sorted(kept(keeper)) == [1, 3]


def test_training_goes_on_without_room_and_the_log_says_so_once(served, tmp_path, caplog):
    state = {"a": jnp.zeros(2**26)}  # 256 MiB: two of them do not fit the limit of this keeper.
    with lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        for step in range(3):
            assert keeper.save(step, state)
            keeper.wait()
        assert (keeper.report.kept, keeper.report.failed) == (0, 3)
        assert "limit_bytes" in keeper.report.error
    assert [r.message.split(":")[0] for r in caplog.records].count(
        "Step 0 is not kept in memory"
    ) == 1
    assert len([r for r in caplog.records if "not kept" in r.message]) == 1


def test_training_goes_on_without_a_keeper(served, tmp_path, monkeypatch):
    state = {"a": jnp.arange(4.0)}
    keeper = lazy_orbax.Keeper(tmp_path, directory=served)
    keeper._link.close()
    monkeypatch.setattr("lazy_orbax.tiers.keeper_link.connected", refused)
    monkeypatch.setattr("lazy_orbax.tiers.keeper_link.start", refused)
    keeper.save(1, state)
    keeper.wait()
    assert keeper.report.failed == 1
    monkeypatch.undo()
    keeper.save(2, state)
    keeper.wait()
    assert keeper.report.newest_step == 2
    keeper.close()


def test_after_the_keeper_was_killed_another_knows_the_trainer(tmp_path, place):
    """Nobody would complete the run otherwise, as the trainer needs no more room."""
    with lazy_orbax.Keeper(tmp_path, directory=place, complete_after_s=1e6) as keeper:
        for step in range(2):
            keeper.save(step, {"a": jnp.arange(4.0)})
            keeper.wait()
        first = listing_of(place)
        ended = os.pidfd_open(first.pid)
        os.kill(first.pid, signal.SIGKILL)
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)
        keeper.save(2, {"a": jnp.arange(4.0)})
        keeper.wait()
        second = listing_of(place)
    assert second.pid not in (None, first.pid)
    assert second.clients == first.clients
    assert {one.step for one in second.snapshots} == {1, 2}


def refused(*_):
    raise KeeperError("nobody is there")


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"a": jnp.ones(2), "z": "text", "bad": object()}, "bad"),
        ({}, "no leaves"),
    ],
)
def test_a_tree_that_cannot_be_kept_is_told_of_and_does_not_raise(keeper, tree, why):
    assert not keeper.save(1, tree)
    assert why in keeper.report.error
    assert keeper.save(2, {"a": jnp.ones(2)})
    keeper.wait()
    assert keeper.report.kept == 1


def test_a_deleted_array_is_told_of(keeper):
    array = jnp.ones(3)
    array.delete()
    assert not keeper.save(1, {"a": array})
    assert "delete" in keeper.report.error


@pytest.mark.parametrize("where", ["take", "views"], ids=["in save", "in the background"])
def test_what_went_wrong_is_told_of(keeper, monkeypatch, where):
    def lost(*_, **__):
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patched:
        patched.setattr(device_to_host, where, lost)
        keeper.save(1, {"a": jnp.ones(3)})
        keeper.wait()
    assert "the device is lost" in keeper.report.error
    assert keeper.report.failed == 1


def test_a_save_to_storage_that_fails_leaves_the_place_free(keeper, tmp_path, monkeypatch):
    """The snapshot was part of it; the next one begins."""
    state = {"a": jnp.arange(4.0)}
    options = lazy_orbax.LazyOptions(keeper=keeper)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(lazy_orbax.save.writer.Writer, "write", refused)
            with pytest.raises(lazy_orbax.errors.SaveError):
                manager.save(1, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
        assert keeper.report.failed == 1
        assert keeper.save(2, state)
        keeper.wait()
    assert sorted(kept(keeper)) == [2]


def test_several_items_have_each_their_place(keeper):
    one, other = {"a": jnp.arange(4.0)}, {"b": jnp.arange(5)}
    assert keeper.save(1, one, item="params")
    assert keeper.save(1, other, item="more")
    keeper.wait()
    found = [s.facts["item"] for _, s in keeper.slots.shelf.snapshots()]
    assert sorted(found) == ["more", "params"]


def test_a_clean_end_leaves_nothing(served, tmp_path):
    with lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        keeper.save(1, {"a": jnp.arange(4.0)})
    assert not os.path.exists(served)
    keeper.close()


def test_an_error_leaves_what_is_kept(served, tmp_path):
    with pytest.raises(ZeroDivisionError), lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        keeper.save(1, {"a": jnp.arange(4.0)})
        raise ZeroDivisionError
    assert sorted(kept(keeper)) == [1]


@pytest.mark.parametrize(
    "keywords",
    [
        {"run": ""},
        {"run": 3},
        {"limit_bytes": 5},
        {"limit_bytes": "1 GB"},
        {"linger_s": 0},
        {"linger_s": float("inf")},
    ],
)
def test_options_out_of_range_are_refused(keywords):
    with pytest.raises(OptionError, match=next(iter(keywords))):
        lazy_orbax.Keeper(**{"run": "/run", **keywords})


def test_a_relative_run_is_the_same_from_everywhere(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lazy_orbax.Keeper("run/", directory=served) as keeper:
        assert keeper.run == str(tmp_path / "run")


def test_an_option_that_is_no_keeper_is_refused():
    with pytest.raises(OptionError, match=r"lazy_orbax\.Keeper"):
        lazy_orbax.LazyOptions(keeper="yes")


def test_numbers_strings_and_what_is_empty_come_back(keeper):
    tree = {"n": 3, "f": 1.5, "s": "tëxt", "none": None, "empty": {}, "w": np.arange(3), "l": [1]}
    tree |= {"keys": jax.random.split(jax.random.key(0), 2), "i4": jnp.ones(3, jnp.int4)}
    assert keeper.save(1, tree)
    keeper.wait()
    found = restored(keeper, 1, tree)
    assert_same(found, tree)
    assert type(found["n"]) is int
    everything = restored(keeper, 1, None)
    assert_same(everything, tree)


def test_two_keepers_of_one_run_never_write_the_same_snapshots(keeper, tmp_path):
    """Else their pieces mix under one seal."""
    with pytest.raises(KeeperError, match="close it"):
        lazy_orbax.Keeper(tmp_path, directory=keeper.slots.shelf.path)


def test_a_forked_child_changes_nothing(keeper, monkeypatch):
    """It has the same object, and its end is not the end of the training."""
    assert keeper.save(1, {"a": jnp.arange(4.0)})
    keeper.wait()
    with monkeypatch.context() as patched:  # A fork under JAX's threads may hang.
        patched.setattr(os, "getpid", lambda: -1)
        assert not keeper.save(2, {"a": jnp.arange(4.0)})
        keeper.close()
    assert "child" in keeper.report.error
    assert sorted(kept(keeper)) == [1]
    assert keeper.save(3, {"a": jnp.arange(4.0)})
    keeper.wait()
    assert sorted(kept(keeper)) == [1, 3]
