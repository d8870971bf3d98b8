"""Two real processes write one checkpoint; a process that knows neither reads it."""

from __future__ import annotations

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.pods.jobs import reports, run_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs the job once. Returns its directory and what each process reported."""
    root = tmp_path_factory.mktemp("job")
    return root, reports(run_job(2, "modes", root, logs=root / "logs"))


def _values():
    rng = np.random.default_rng(1)
    return {
        "sharded": rng.standard_normal((512, 768), dtype=np.float32),
        "rows": rng.integers(-128, 128, (64, 33), dtype=np.int8),
        "replicated": rng.standard_normal((256, 128), dtype=np.float32),
        "prime": rng.standard_normal((257, 127), dtype=np.float32),
        "step": np.array(1, dtype=np.int32),
    }


MODES = ("stage", "direct", "auto", "files", "in_step")


@pytest.mark.parametrize("mode", MODES)
def test_what_two_processes_saved_restores_in_one(job, mode):
    root, reports = job
    values = _values()
    changed = {name: value + np.ones((), value.dtype) for name, value in values.items()}
    changed = {name: value + np.ones((), value.dtype) for name, value in changed.items()}
    with ocp.CheckpointManager(root / mode) as manager:
        assert manager.all_steps() == [1, 4]
        for step, wanted in ((1, values), (4, changed)):
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
            found = manager.restore(step, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            assert sorted(found) == sorted(wanted)
            for name, value in wanted.items():
                assert found[name].dtype == value.dtype
                assert found[name].tobytes() == value.tobytes(), name
    assert [report["modes"][mode] for report in reports] == [[1, 4], [1, 4]]


@pytest.mark.parametrize("mode", MODES)
def test_every_byte_is_written_by_one_process(job, mode):
    _, reports = job
    per_step = zip(*(report["bytes"][mode] for report in reports), strict=True)
    totals = [sum(bytes_written) for bytes_written in per_step]
    n_bytes = sum(value.nbytes for value in _values().values())
    assert totals == [n_bytes, n_bytes]
    # Shared about evenly: nobody writes all of it.
    assert all(max(report["bytes"][mode]) < 0.7 * n_bytes for report in reports)


def test_an_array_of_one_process_is_refused_on_both(job):
    _, reports = job
    for i, report in enumerate(reports):
        message = report["local"]
        assert "['bad']" in message
        assert "['ok']" not in message
        assert f"process {i} alone" in message
        assert "make it a global array" in message


def test_an_array_without_a_shard_here_is_refused_on_both(job):
    _, (first, second) = job
    assert "['bad']" in first["elsewhere"]
    assert "process 0 alone" in first["elsewhere"]
    assert "['bad']" in second["elsewhere"]
    assert "no shard on process 1" in second["elsewhere"]


def test_what_the_step_copied_is_not_copied_again(job):
    _, reports = job
    assert [report["in_step"] for report in reports] == [["in_step"], ["in_step"]]


def test_no_host_memory_is_kept(job):
    _, reports = job
    assert [report["in_flight"] for report in reports] == [0, 0]
