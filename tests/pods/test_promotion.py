"""Two real processes share a keeper: a step goes down to a tier when both have their part."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile

import pytest
from equipment.pods.jobs import reports, run_job

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


def test_processes_with_a_keeper_each_have_no_tiers(tmp_path, memory):
    told = reports(run_job(2, "keepers_apart", tmp_path, logs=tmp_path / "logs", memory=memory))
    assert all("process 1 has another than process 0" in one for one in told)
