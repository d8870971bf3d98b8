"""Two real processes write one checkpoint; a process that knows neither reads it."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

_HERE = pathlib.Path(__file__).parent
_TIMEOUT_S = 100
_N = 2


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs the job once. Returns its directory and what each process reported."""
    root = tmp_path_factory.mktemp("job")
    address = f"127.0.0.1:{_free_port()}"
    roots = [str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    logs = [root / f"log_{i}" for i in range(_N)]
    processes = []
    try:
        for i in range(_N):
            with logs[i].open("w") as log:
                arguments = [str(_HERE / "worker.py"), address, str(_N), str(i), str(root)]
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )
        for process in processes:
            process.wait(_TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
            process.wait(_TIMEOUT_S)
    reports = []
    for log in logs:
        lines = [line for line in log.read_text().splitlines() if line.startswith("REPORT ")]
        assert lines, f"a process did not finish:\n{log.read_text()[-6000:]}"
        reports.append(json.loads(lines[0].removeprefix("REPORT ")))
    return root, reports


def _values():
    rng = np.random.default_rng(1)
    return {
        "sharded": rng.standard_normal((512, 768), dtype=np.float32),
        "rows": rng.integers(-128, 128, (64, 33), dtype=np.int8),
        "replicated": rng.standard_normal((256, 128), dtype=np.float32),
        "prime": rng.standard_normal((257, 127), dtype=np.float32),
        "step": np.array(1, dtype=np.int32),
    }


MODES = ("stage", "direct", "auto", "in_step")


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
