"""Several processes save with Orbax v1; a process that knows none of them reads it."""

from __future__ import annotations

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.pods import states
from equipment.pods.jobs import reports, run_job
from orbax.checkpoint import v1

import lazy_orbax


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def job(request, tmp_path_factory):
    """Runs the job once. Returns its directory and what each process reported."""
    root = tmp_path_factory.mktemp("job")
    return root, reports(run_job(request.param, "saved_by_v1", root, logs=root / "logs"))


def test_what_all_saved_restores_in_one(job, mesh):
    root, _ = job
    targets = states.targets(mesh, states.OTHER_SPECS)
    for n, n_steps in ((1, 1), (2, 4), (3, 7), (4, 9)):
        found = v1.load(root / "functions" / str(n), targets)
        assert states.differences(found, states.values(n_steps)) == []
    with ocp.CheckpointManager(root / "run") as stock:
        assert stock.all_steps() == [1, 2, 4]
        for n, n_steps in ((1, 9), (2, 12), (4, 15)):
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in states.SPECS}
            wanted = ocp.args.PyTreeRestore(restore_args=as_numpy)
            found = stock.restore(n, args=ocp.args.Composite(state=wanted)).state
            for name, value in states.values(n_steps).items():
                assert found[name].tobytes() == value.tobytes(), name
    more = {"step": targets["step"], "text": str}
    assert v1.load(root / "run" / "2", more, checkpointable_name="more")["text"] == "Grüße"
    assert lazy_orbax.verify(root / "run").is_whole
    assert lazy_orbax.verify(root / "functions").is_whole


def test_all_hear_of_a_failure_on_one_and_the_same_step_is_saved_again(job):
    _, reports = job
    for report in reports:
        assert "no luck at finish" in report["function"]
        assert f"process {len(reports) - 1}" in report["function"]
        assert "no luck at finish" in report["checkpointer"]
        assert (report["again"], report["saved"]) == ("", True)
        assert report["steps"] == [1, 2, 4]


def test_nothing_is_left_behind(job):
    _, reports = job
    for report in reports:
        assert report["left"] == []
        assert report["directories"] == ["1", "2", "3", "4"]
        assert report["in_flight"] == 0
        assert report["failed"] == 2
    # The process that publishes knows that it did.
    assert reports[0]["committed"] == ["1", "2", "3", "4", "1", "1", "2", "2", "4"]


def test_all_restore_what_all_saved(job):
    _, reports = job
    assert [report["wrong"] for report in reports] == [[]] * len(reports)


@pytest.mark.slow
def test_both_save_the_same_last_step(tmp_path, mesh):
    root = tmp_path / "run"
    first, second = reports(run_job(2, "preempted_in_v1", root, logs=tmp_path, signalled=1))
    assert first["committed"], first["error"]
    assert first["step"] == second["step"] > 2
    assert second["committed"], second["error"]
    found = v1.load(root / str(first["step"]), states.targets(mesh, states.SPECS))
    assert states.differences(found, states.values(first["step"])) == []
