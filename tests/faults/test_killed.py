"""A process killed in mid-save: the step before is whole, the killed one is not there."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest
from equipment.training import Steps, make_state
from equipment.trees import assert_same

import lazy_orbax

_TESTS = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("place", "call", "mode"),
    [
        ("copy", 2, "stage"),
        # Each call that changes the file system is a point in `test_crash_matrix.py`.
        pytest.param("to the host", 2, "direct", marks=pytest.mark.slow),
        pytest.param("hand over", 2, "stage", marks=pytest.mark.slow),
        pytest.param("finish", 1, "direct", marks=pytest.mark.slow),
        ("sync", 3, "stage"),
    ],
)
def test_a_killed_process_leaves_the_step_before(tmp_path, mesh, place, call, mode):
    root = tmp_path / "run"
    path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, str(_TESTS / "faults" / "killed.py"), str(root), place, str(call), mode],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    handler = lazy_orbax.standard_handler()
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == [1]
        assert_same(stock.restore(1), wanted)
    with ocp.CheckpointManager(root, item_handlers=handler) as manager:
        assert manager.latest_step() == 1
        manager.save(2, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        assert_same(manager.restore(2), wanted)
