"""A tier is looked at as memory and storage are: the newest whole step wins, and why is said."""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same

import lazy_orbax
from lazy_orbax._paths import PROMOTED
from lazy_orbax.errors import CorruptCheckpointError, OptionError, RestoreError
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.tiers.restored_tier import MOST_STEPS, from_tier, steps_in_tier


def state(step):
    return {"a": jnp.arange(64.0) + step, "n": step}


@pytest.fixture
def run(tmp_path, served):
    """A manager with step 10 in storage, and a keeper with 20 and 30 in memory and in a tier."""
    tier = lazy_orbax.Tier(tmp_path / "tier", every_s=1e6)
    keeper = lazy_orbax.Keeper(tmp_path / "run", directory=served, tiers=[tier])
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(10, args=ocp.args.StandardSave(state(10)))
        manager.wait_until_finished()
        for step in (20, 30):
            keeper.save(step, state(step))
            keeper.wait()
            assert promote(keeper.run, tier, served) == step
        yield manager, keeper
    keeper.close()


def newest(run, target=None, **keywords):
    manager, keeper = run
    args = ocp.args.StandardRestore(state(0) if target is None else target, **keywords)
    return lazy_orbax.restore_newest(manager, keeper, args=args)


def forget(keeper):
    """What a machine does that starts again."""
    for file in keeper.slots.files(["default"]):
        keeper.slots.shelf.remove(file)


def damage(directory):
    files = [os.path.join(at, name) for at, _, names in os.walk(directory) for name in names]
    os.truncate(max(files, key=os.path.getsize), 10)


def test_of_one_step_memory_is_faster(run):
    assert newest(run).tier == "memory"


def test_where_memory_is_gone_the_tier_is_next(run):
    _, keeper = run
    forget(keeper)
    found = newest(run)
    path = keeper.tiers[0].path
    assert (found.step, found.tier, found.skipped) == (30, path, ())
    assert found.why == f"{path} has it whole; the newest in storage is 10"
    assert_same(found.value, state(30))


def test_a_broken_step_of_a_tier_is_passed_over(run, caplog):
    _, keeper = run
    forget(keeper)
    damage(f"{keeper.tiers[0].path}/30")
    found = newest(run)
    assert (found.step, found.tier) == (20, keeper.tiers[0].path)
    assert_same(found.value, state(20))
    ((step, directory, _),) = map(dataclasses.astuple, found.skipped)
    assert (step, directory) == (30, f"{keeper.tiers[0].path}/30/default")


def test_without_a_whole_one_storage_is_taken(run, caplog):
    _, keeper = run
    forget(keeper)
    for step in (20, 30):
        damage(f"{keeper.tiers[0].path}/{step}")
    found = newest(run)
    assert (found.step, found.tier) == (10, "storage")
    assert [one.step for one in found.skipped] == [30, 20]
    assert len([r for r in caplog.records if "passed over" in r.message]) == 2


def test_what_is_newer_in_the_tier_than_in_memory_is_taken_from_there(run):
    manager, keeper = run
    with ocp.CheckpointManager(keeper.tiers[0].path) as other:
        other.save(40, args=ocp.args.StandardSave(state(40)))
    assert newest(run).step == 40
    manager.save(50, args=ocp.args.StandardSave(state(50)))
    manager.wait_until_finished()
    assert newest(run).tier == "storage"


def test_a_target_that_does_not_fit_is_the_callers_mistake(run):
    forget(run[1])
    with pytest.raises(RestoreError, match="leaf a"):
        newest(run, {"a": jnp.zeros(3), "n": 0})


def test_what_more_is_wanted_than_a_target_goes_to_storage(run, caplog):
    _, keeper = run
    forget(keeper)
    args = ocp.args.PyTreeRestore(state(0), restore_args={"a": ocp.RestoreArgs()})
    values, error = from_tier(keeper.tiers[0].path, 30, keeper.run, {"default": args})
    assert values == {}
    assert "restore_args" in str(error)
    assert "does not find step 7" in str(from_tier(keeper.tiers[0].path, 7, keeper.run, {})[1])


def test_without_a_target_arrays_are_numpys(run):
    manager, keeper = run
    forget(keeper)
    found = lazy_orbax.restore_newest(manager, keeper)
    assert isinstance(found.value["a"], np.ndarray)
    assert_same(found.value, state(30))


def test_a_tier_that_cannot_be_listed_is_passed_over(run, caplog):
    _, keeper = run
    forget(keeper)
    path = keeper.tiers[0].path
    os.rename(path, f"{path}-moved")
    with open(path, "w"):
        found = newest(run)
    assert (found.step, found.tier) == (10, "storage")
    assert [(one.directory, "cannot be listed" in one.why) for one in found.skipped] == [
        (path, True)
    ]


def test_the_manager_of_another_run_is_refused(run, tmp_path):
    with (
        ocp.CheckpointManager(tmp_path / "other") as other,
        pytest.raises(OptionError, match=r"of one run, and found those of .*/other and .*/run"),
    ):
        newest((other, run[1]))


def test_the_newest_steps_are_tried_and_no_more(tmp_path):
    for step in range(MOST_STEPS + 3):
        (tmp_path / str(step)).mkdir()
    assert steps_in_tier(str(tmp_path)) == list(range(MOST_STEPS + 2, 2, -1))


@pytest.mark.parametrize("is_all_broken", [False, True])
def test_what_is_whole_elsewhere_is_better_than_an_older_step_in_storage(run, is_all_broken):
    manager, keeper = run
    manager.save(40, args=ocp.args.StandardSave(state(40)))
    manager.wait_until_finished()
    for step in (40, 10) if is_all_broken else (40,):
        damage(f"{manager.directory}/{step}")
    assert (newest(run).step, newest(run).tier) == (30, "memory")
    forget(keeper)
    found = newest(run)
    assert (found.step, found.tier) == (30, keeper.tiers[0].path)
    assert_same(found.value, state(30))
    assert [one.step for one in found.skipped] == ([] if is_all_broken else [40])
    for step in (20, 30):
        damage(f"{keeper.tiers[0].path}/{step}")
    if is_all_broken:
        with pytest.raises(CorruptCheckpointError) as caught:
            newest(run)
        assert len(caught.value.__notes__) >= 2
    else:
        assert (newest(run).step, newest(run).tier) == (10, "storage")


def test_what_another_run_brought_there_is_none_of_ours(run, caplog):
    _, keeper = run
    forget(keeper)
    mark = os.path.join(keeper.tiers[0].path, "30", PROMOTED)
    with open(mark, "w") as file:
        file.write('{"run": "/another"}')
    found = newest(run)
    assert (found.step, found.tier) == (20, keeper.tiers[0].path)
    assert "of the run '/another'" in found.skipped[0].why


def test_a_target_that_leaves_arrays_out_says_so(run):
    """As where it is restored from memory or storage: a mistake would lose a part of the state."""
    _, keeper = run
    forget(keeper)
    like = {"a": state(0)["a"]}
    with pytest.raises(RestoreError, match="leaf n: found it, wanted no such leaf"):
        newest(run, like)
    args = ocp.args.PyTreeRestore(item=like, partial_restore=True)
    values, error = from_tier(keeper.tiers[0].path, 30, keeper.run, {"default": args})
    assert error is None
    assert_same(values["default"], {"a": state(30)["a"]})
