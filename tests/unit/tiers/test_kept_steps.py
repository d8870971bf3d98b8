"""A step counts if every process's part is there, and nobody has begun to write over it."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

import lazy_orbax
from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.kept_steps import KeptStep, held_for, kept_steps
from lazy_orbax.tiers.snapshot_file import SnapshotError, held


def save(keeper, step, item="default"):
    keeper.save(step, {"a": jnp.full(3, step)}, item=item)
    keeper.wait()


@pytest.fixture
def keeper(served, tmp_path):
    with lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        save(keeper, 1)
        save(keeper, 2)
        yield keeper


def test_the_one_that_was_written_last_comes_first(keeper):
    found = kept_steps(keeper.slots.shelf, keeper.run)
    assert [kept.step for kept in found] == [2, 1]
    assert np.array_equal(found[0].values()["default"]["a"], [2, 2, 2])
    assert kept_steps(keeper.slots.shelf, "/another") == []


@pytest.mark.parametrize("before", [(), (4,)])  # Either of the two files may have the older one.
def test_of_a_step_that_was_taken_again_the_last_one_counts(served, tmp_path, before):
    with lazy_orbax.Keeper(tmp_path, directory=served) as keeper:
        for step, value in (*((step, 0) for step in before), (5, 1), (5, 2)):
            keeper.save(step, {"a": np.full(3, value)})
            keeper.wait()
        found = kept_steps(keeper.slots.shelf, keeper.run)
        assert [kept.step for kept in found] == [5, 5]
        assert found[0].life > found[1].life
        assert [kept.values()["default"]["a"].tolist() for kept in found] == [[2] * 3, [1] * 3]


def test_a_clock_that_goes_back_makes_nothing_older(keeper, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    save(keeper, 3)
    assert [kept.step for kept in kept_steps(keeper.slots.shelf, keeper.run)] == [3, 2]


def test_what_the_job_went_back_from_is_left_out(keeper):
    """It would be brought to tiers, where a restore takes the newest."""
    for step, found in ((3, [3, 2]), (1, [1]), (2, [2, 1])):
        save(keeper, step)
        assert [kept.step for kept in kept_steps(keeper.slots.shelf, keeper.run)] == found


def test_a_step_without_all_items_does_not_count(keeper):
    save(keeper, 2, "more")
    assert [kept.step for kept in kept_steps(keeper.slots.shelf, keeper.run)] == [2]


def test_what_is_written_over_meanwhile_is_noticed(keeper):
    new, old = kept_steps(keeper.slots.shelf, keeper.run)
    new.refuse_other()
    save(keeper, 3)
    new.refuse_other()
    with pytest.raises(SnapshotError, match="written over"):
        old.refuse_other()
    for file in keeper.slots.files(["default"]):
        keeper.slots.shelf.remove(file)
    with pytest.raises(FileNotFoundError):
        new.refuse_other()


def test_what_is_held_is_not_written_over(keeper):
    new, _ = kept_steps(keeper.slots.shelf, keeper.run)
    with held(new.paths), held(new.paths):
        save(keeper, 3)  # The other file is free.
        save(keeper, 4)
        save(keeper, 5)
        assert keeper.report == lazy_orbax.reports.KeeperReport(kept=3, skipped=2, newest_step=3)
        new.refuse_other()
    save(keeper, 6)
    assert keeper.report.newest_step == 6
    assert [kept.step for kept in kept_steps(keeper.slots.shelf, keeper.run)] == [6, 3]


def test_a_step_of_a_pod_needs_the_part_of_every_process(keeper):
    ((snapshot,),) = kept_steps(keeper.slots.shelf, keeper.run)[0].items.values()
    parts = [
        dataclasses.replace(snapshot, facts={**snapshot.facts, "processes": 3, "process": i})
        for i in range(3)
    ]
    KeptStep(2, {"default": parts}).refuse_parts()
    with pytest.raises(KeeperError, match="step 2 of the item default: .* process 1 "):
        KeptStep(2, {"default": [parts[0], parts[2]]}).refuse_parts()
    with pytest.raises(KeeperError, match="item more: .* process 0 "):
        KeptStep(2, {"default": parts, "more": parts[1:]}).refuse_parts()


def test_what_is_held_for_a_while_is_let_go_whatever_goes_on(keeper):
    with held_for(keeper.slots.shelf, 3600):
        save(keeper, 3)
        assert (keeper.report.newest_step, keeper.report.skipped) == (2, 1)
    save(keeper, 4)
    assert keeper.report.newest_step == 4
    with held_for(keeper.slots.shelf, 0):
        step = 4
        while keeper.report.newest_step == 4:
            step += 1
            save(keeper, step)
        assert keeper.report.newest_step == step
