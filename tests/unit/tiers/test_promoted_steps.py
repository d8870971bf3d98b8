"""Of a tier's directories, only those that were promoted are ever removed."""

import json
import os
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lazy_orbax._paths import PROMOTED, STEP_METADATA
from lazy_orbax.errors import KeeperError
from lazy_orbax.storage.places import LocalPlace
from lazy_orbax.tiers.promoted_steps import (
    listed,
    newest_in,
    refuse_others,
    remove_unfinished,
    retire,
)

RUN = "/run"
MARK = json.dumps({"run": RUN})


@pytest.fixture
def tier(tmp_path):
    """Steps 1 to 5 of stock Orbax, of which 1, 3 and 5 bear the mark."""
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in range(1, 6):
            manager.save(step, args=ocp.args.StandardSave({"a": np.full(3, step)}))
    for step in (1, 3, 5):
        (tmp_path / str(step) / PROMOTED).write_text(MARK)
    return tmp_path


def test_the_newest_counts_whoever_saved_it(tier):
    assert newest_in(str(tier)) == 5
    assert [step for step, _ in listed(str(tier))] == [1, 2, 3, 4, 5]
    assert newest_in(str(tier / "nothing")) == -1


@pytest.mark.parametrize(("keep", "left"), [(3, "12345"), (2, "2345"), (1, "245")])
def test_the_oldest_that_were_promoted_go(tier, keep, left):
    retire(str(tier), RUN, keep)
    assert sorted(os.listdir(tier)) == list(left)
    with ocp.CheckpointManager(tier) as manager:
        assert np.array_equal(manager.restore(2)["a"], [2, 2, 2])


def test_only_what_promotions_left_is_removed(tier):
    """The others may be saves that are running."""
    for name in ("6.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp", "notes"):
        (tier / name).mkdir()
    (tier / "6.orbax-checkpoint-tmp" / PROMOTED).write_text(MARK)
    (tier / "7.orbax-checkpoint-tmp" / PROMOTED).write_text('{"run": "/run-2"}')
    # Killed in the middle of a removal, and just before its end.
    (tier / "5").rename(tier / "5.orbax-checkpoint-tmp-going")
    (tier / "0.orbax-checkpoint-tmp-going").mkdir()
    remove_unfinished(str(tier), RUN)
    assert sorted(os.listdir(tier)) == ["1", "2", "3", "4", "7.orbax-checkpoint-tmp", "notes"]


def test_what_an_earlier_removal_left_is_in_nobodys_way(tier):
    (tier / "1.orbax-checkpoint-tmp-going" / "default").mkdir(parents=True)
    retire(str(tier), RUN, 2)
    assert sorted(os.listdir(tier)) == ["2", "3", "4", "5"]


@pytest.mark.parametrize("mark", ['{"run": "/run-2"}', "{}", "torn"])
def test_the_steps_of_another_run_stay_and_are_refused(tier, mark):
    refuse_others(str(tier), RUN)
    (tier / "1" / PROMOTED).write_text(mark)
    retire(str(tier), RUN, 1)
    assert sorted(os.listdir(tier)) == ["1", "2", "4", "5"]
    with pytest.raises(KeeperError, match="/1 is of the run"):
        refuse_others(str(tier), RUN)


def test_a_directory_beside_is_no_step(tier):
    (tier / "exp-2024").mkdir()
    assert newest_in(str(tier)) == 5
    (tier / "4").rename(tier / "step_4")
    (tier / "7").mkdir()  # A manager lists it.
    assert [step for step, _ in listed(str(tier))] == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("looked_for", [PROMOTED, STEP_METADATA])
def test_a_step_may_be_removed_while_another_machine_looks(tier, monkeypatch, looked_for):
    """It has seen that the file is there, and does not find it when it reads."""
    (tier / "5").rename(tier / "run_5")
    has = LocalPlace.has

    def has_and_then_it_goes(place, name):
        found = has(place, name)
        if found and name == looked_for and place.path.endswith("5"):
            shutil.rmtree(place.path)
        return found

    monkeypatch.setattr(LocalPlace, "has", has_and_then_it_goes)
    refuse_others(str(tier), RUN)
