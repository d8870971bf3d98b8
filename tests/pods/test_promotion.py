"""Real processes share a keeper, or have one each: a step goes to a tier when all have a part."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile

import orbax.checkpoint as ocp
import pytest
from equipment.pods import states
from equipment.pods.jobs import reports, run_job

import lazy_orbax
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.messages import asked

pytestmark = pytest.mark.slow  # `tests/unit/handlers` has a step of which a part is missing.


@pytest.fixture
def memory():
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield str(above / "k")
    for name in os.listdir(above):
        with contextlib.suppress(OSError), connected(str(above / name)) as peer:
            asked(peer, {"do": "stop", "discard": True}, timeout_s=60)
    shutil.rmtree(above)


def test_a_step_is_listed_when_every_process_has_its_part(tmp_path, memory):
    told = reports(run_job(2, "promoted", tmp_path, logs=tmp_path / "logs", memory=memory))
    assert "found no snapshot of process 1" in told[0]["why"]
    for one in told:
        assert one["before"] == []
        assert one["found"] == [5, f"{tmp_path}/tier"]
        assert one["wrong"] == []
    assert os.listdir(tmp_path / "tier") == ["5"]


def test_a_step_that_is_taken_again_is_never_of_two_states(tmp_path, memory):
    told = reports(run_job(2, "stepped_back", tmp_path, logs=tmp_path / "logs", memory=memory))
    assert [one["found"] for one in told] == [[[[6]], [], [[5]]]] * 2


@pytest.mark.parametrize("n", [2, 4])
def test_processes_with_a_keeper_each_bring_a_step_to_a_tier_that_all_see(tmp_path, memory, n):
    told = reports(run_job(n, "keepers_apart", tmp_path, logs=tmp_path / "logs", memory=memory))
    for one in told:
        assert "is not shared: process 1 does not find there" in str(one["why"])
        assert one["found"] == [6, f"{tmp_path}/tier"]
        assert one["wrong"] == []
    with ocp.CheckpointManager(tmp_path / "tier") as stock:
        assert stock.latest_step() == 6
        found, wanted = stock.restore(6), states.values(6)
    assert sorted(found) == sorted(wanted)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert lazy_orbax.verify(tmp_path / "tier" / "6").is_whole
