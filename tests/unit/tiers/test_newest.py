"""The newest whole step is restored, from memory or storage, and what was passed over is said."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same

import lazy_orbax
from lazy_orbax.errors import CorruptCheckpointError, OptionError, RestoreError
from lazy_orbax.pods import consensus
from lazy_orbax.tiers.kept_tree import KeptTree
from lazy_orbax.tiers.snapshot_file import PAGE_BYTES


def state(step):
    return {"a": jnp.arange(64.0) + step, "n": step}


@pytest.fixture
def run(tmp_path, served):
    """A manager with step 10 in storage, and a keeper with steps 20 and 30 in memory."""
    keeper = lazy_orbax.Keeper(tmp_path, directory=served)
    handler = lazy_orbax.standard_handler()
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(10, args=ocp.args.StandardSave(state(10)))
        manager.wait_until_finished()
        for step in (20, 30):
            keeper.save(step, state(step))
            keeper.wait()
        yield manager, keeper
    keeper.close()


def newest(run, **keywords):
    manager, keeper = run
    args = ocp.args.StandardRestore(state(0))
    return lazy_orbax.restore_newest(manager, keeper, **{"args": args, **keywords})


def damage(keeper, step, at=PAGE_BYTES):
    for _, snapshot in keeper.slots.shelf.snapshots():
        if snapshot.step == step:
            with open(snapshot.path, "r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))


def test_the_newest_in_memory_is_taken_and_storage_is_not_read(run, monkeypatch):
    monkeypatch.setattr(ocp.CheckpointManager, "restore", None)
    found = newest(run)
    assert (found.step, found.tier, found.skipped) == (30, "memory", ())
    assert "storage is 10" in found.why
    assert_same(found.value, state(30))


def test_a_flipped_bit_makes_the_one_before_count(run, caplog):
    damage(run[1], 30)
    found = newest(run)
    assert (found.step, found.tier) == (20, "memory")
    assert_same(found.value, state(20))
    (skipped,) = found.skipped
    assert skipped.step == 30
    assert "leaf a" in skipped.why


@pytest.mark.parametrize("at", [PAGE_BYTES, 3])
def test_without_a_whole_snapshot_storage_is_taken(run, at, caplog):
    damage(run[1], 20, at)
    damage(run[1], 30, at) if at == PAGE_BYTES else damage_seals(run[1])
    found = newest(run)
    assert (found.step, found.tier) == (10, "storage")
    assert_same(found.value, state(10))
    assert len(found.skipped) == 2
    assert [r for r in caplog.records if "passed over" in r.message]


def damage_seals(keeper):
    for file in keeper.slots.shelf.files():
        with open(keeper.slots.shelf.path_of(file), "r+b") as opened:
            opened.write(b"torn")


def test_what_is_newer_in_storage_is_taken_from_there(run):
    manager, _ = run
    manager.save(40, args=ocp.args.StandardSave(state(40)))
    manager.wait_until_finished()
    found = newest(run)
    assert (found.step, found.tier) == (40, "storage")
    assert "memory has 30" in found.why


def test_of_one_step_memory_is_faster(run):
    manager, _ = run
    manager.save(30, args=ocp.args.StandardSave(state(30)))
    manager.wait_until_finished()
    assert newest(run).tier == "memory"


def test_a_run_that_went_back_is_continued_from_where_it_last_was(run):
    """The step that was sealed last counts, and not the highest one of an older life."""
    _, keeper = run
    keeper.slots.begin_life()
    keeper.save(15, state(15))
    keeper.wait()
    assert newest(run).step == 15


def test_a_step_that_was_taken_again_is_restored_as_it_was_last(run):
    run[1].save(30, state(31))
    run[1].wait()
    found = newest(run)
    assert (found.step, found.tier) == (30, "memory")
    assert_same(found.value, state(31))


def test_snapshots_of_two_lives_are_not_put_together(run, monkeypatch):
    """Process 1 of an older life has step 30 as well, which came to other values there."""
    _, keeper = run
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_index", lambda *_: 1)
        other = lazy_orbax.Keeper(keeper.run, directory=keeper.slots.shelf.path)
        other.save(30, state(99))
        other.wait()
    found = newest(run)
    assert found.step == 30
    assert_same(found.value, state(30))
    other.close()


def test_a_target_that_does_not_fit_is_the_callers_mistake(run):
    with pytest.raises(RestoreError, match="leaf a"):
        newest(run, args=ocp.args.StandardRestore({"a": jnp.zeros(3), "n": 0}))


def test_trouble_of_this_machine_is_told_to_all_before_it_is_raised(run, monkeypatch):
    told, tell = [], consensus.which_processes

    def no_memory(*_, **__):
        raise MemoryError("no memory")

    def noted(has_failed):
        told.append(has_failed)
        return tell(has_failed)

    monkeypatch.setattr(KeptTree, "restored", no_memory)
    monkeypatch.setattr(consensus, "which_processes", noted)
    with pytest.raises(MemoryError, match="no memory"):
        newest(run)
    assert told == [True]


def test_without_a_target_all_of_it_comes(run):
    assert_same(newest(run, args=None).value, state(30))


def test_items_are_of_one_step(tmp_path, served):
    keeper = lazy_orbax.Keeper(tmp_path, directory=served)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step, items in ((1, ("x", "y")), (2, ("x",))):
            for item in items:
                keeper.save(step, state(step), item=item)
                keeper.wait()
        each = ocp.args.StandardRestore(state(0))
        args = ocp.args.Composite(x=each, y=each)
        found = lazy_orbax.restore_newest(manager, keeper, args=args)
        assert found.step == 1
        assert_same(dict(found.value.items()), {"x": state(1), "y": state(1)})
    keeper.close()


def test_where_there_is_nothing_it_says_so(tmp_path, served):
    with (
        lazy_orbax.Keeper(tmp_path / "empty", directory=served) as keeper,
        ocp.CheckpointManager(tmp_path / "empty") as manager,
        pytest.raises(FileNotFoundError, match="no step"),
    ):
        lazy_orbax.restore_newest(manager, keeper)


def test_what_is_passed_over_in_memory_is_told_where_storage_fails_too(run, tmp_path):
    for step in (20, 30):
        damage(run[1], step)
    for path in (tmp_path / "10").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            os.truncate(path, 100)
    with pytest.raises(CorruptCheckpointError) as caught:
        newest(run)
    assert any("step 30" in note for note in caught.value.__notes__)


def test_wrong_arguments_are_named(run):
    manager, keeper = run
    with pytest.raises(OptionError, match="manager"):
        lazy_orbax.restore_newest(keeper, manager)
    with pytest.raises(OptionError, match="Keeper"):
        lazy_orbax.restore_newest(manager, manager)


def test_the_next_step_goes_on_as_if_nothing_had_happened(run):
    _, keeper = run
    found = newest(run)
    value = jax.tree.map(np.asarray, found.value)
    keeper.save(40, found.value)
    keeper.wait()
    again = newest(run)
    assert again.step == 40
    assert_same(jax.tree.map(np.asarray, again.value), value)


def test_what_memory_cannot_follow_is_for_storage(tmp_path, served):
    """Else it came with another dtype than was asked for."""
    values = {step: {"a": np.arange(4.0) + step, "n": step} for step in (0, 1, 5)}
    half = ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float16)
    with lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        keeper.save(5, values[5])
        keeper.wait()
        handler = lazy_orbax.pytree_handler()
        with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
            manager.save(1, args=ocp.args.PyTreeSave(values[1]))
            manager.wait_until_finished()
            more = {"restore_args": {"a": half, "n": ocp.RestoreArgs(restore_type=int)}}
            args = ocp.args.PyTreeRestore(values[0], **more)
            found = newest((manager, keeper), args=args)
    assert (found.step, found.tier) == (1, "storage")
    assert found.value["a"].dtype == np.float16
    (skipped,) = found.skipped
    assert "`restore_args`" in skipped.why
