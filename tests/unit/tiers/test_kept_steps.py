"""A step counts if every process's part is there, and nobody has begun to write over it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lazy_orbax
from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.kept_steps import KeptStep, kept_steps


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


def test_a_step_without_all_items_does_not_count(keeper):
    save(keeper, 2, "more")
    assert [kept.step for kept in kept_steps(keeper.slots.shelf, keeper.run)] == [2]


def test_what_is_written_over_meanwhile_is_noticed(keeper):
    new, old = kept_steps(keeper.slots.shelf, keeper.run)
    assert new.is_as_it_was()
    save(keeper, 3)
    assert new.is_as_it_was()
    assert not old.is_as_it_was()
    for file in keeper.slots.files(["default"]):
        keeper.slots.shelf.remove(file)
    assert not new.is_as_it_was()


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
