"""A merge that is killed leaves no step, and can be made again."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import lazy_orbax
from lazy_orbax.inspect import clean

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPT = """
import os, signal, sys
from lazy_orbax.combine import merge, merge_output, merge_writer

root, owner, name, call = sys.argv[1:]
owner = {"os": os, "writer": merge_writer.LeafWriter, "output": merge_output.Output}[owner]
original, calls = getattr(owner, name), 0

def killing(*arguments, **keywords):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)

setattr(owner, name, killing)
merge.merge([f"{root}/1", f"{root}/2"], "uniform", f"{root}/3", host_bytes=2**20)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, each one item."""
    root = tmp_path_factory.mktemp("merge") / "run"
    for step in (1, 2):
        state = {f"w{i}": np.full((64, 1024), step, np.float32) for i in range(8)}
        handler = lazy_orbax.pytree_handler()
        ocp.Checkpointer(handler).save(
            epath.Path(root / str(step)), args=ocp.args.PyTreeSave(state)
        )
    return root


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param("writer", "write", 1, marks=pytest.mark.slow),
        ("writer", "write", 6),
        pytest.param("output", "finish", 1, marks=pytest.mark.slow),
        pytest.param("writer", "merge_databases", 1, marks=pytest.mark.slow),
        pytest.param("output", "_sync", 2, marks=pytest.mark.slow),
        ("os", "rename", 1),
    ],
)
def test_a_killed_merge_leaves_no_step(run, owner, name, call):
    killed = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(run), owner, name, str(call)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert not (run / "3").exists()
    with ocp.CheckpointManager(run, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        assert manager.all_steps() == [1, 2]
    lazy_orbax.merge([run / "1", run / "2"], "uniform", run / "3")
    assert (lazy_orbax.load(run / "3")["w7"] == 1.5).all()
    ocp.test_utils.erase_and_create_empty(run / "3").rmdir()
    clean(run, dry_run=False, quiet_s=0)
    assert sorted(path.name for path in run.iterdir()) == ["1", "2"]
