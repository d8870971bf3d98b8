"""A process is killed in a save of Orbax v1: what v1 listed stays, and nothing else shows."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest
from equipment.pods import states
from equipment.pods.jobs import assert_killed, ends_of, start_job
from equipment.pods.kill_points import ON_EACH, ON_PRIMARY, is_committed
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax.handlers.v1 import lazy_v1

WAYS = ("save", "Checkpointer")

# How many processes, the point, who comes to it, who is killed then.
OF_THE_PRIMARY = [(2, point, 0, 0) for point in (*ON_EACH[::2], *ON_PRIMARY)]
OF_ANOTHER = [
    *((2, point, 1, 1) for point in ON_EACH[1::2]),
    *((2, point, 0, 1) for point in ON_PRIMARY),
    (4, "before the finish", 3, 3),
    (4, "before the merge", 0, 2),
    (4, "after the commit", 0, 0),
]
_BY_DEFAULT = (("save", 2, "before the commit", 0, 0), ("Checkpointer", 2, "after the merge", 0, 0))
CASES = [
    pytest.param(way, case, marks=[] if (way, *case) in _BY_DEFAULT else [pytest.mark.slow])
    for way in WAYS
    for case in (*OF_THE_PRIMARY, *OF_ANOTHER)
]


@pytest.mark.parametrize(("way", "case"), CASES, ids=str)
def test_a_process_is_killed(tmp_path, way, case):
    n, point, watched, victim = case
    root, pids = tmp_path / "run", tmp_path / "pids"
    pids.mkdir()
    kill = {"point": point, "watched": watched, "victim": victim, "pids": str(pids)}
    [ended] = ends_of([start_job(n, "killed_in_v1", root, logs=tmp_path, way=way, **kill)])
    assert_killed(ended, victim)
    steps = [1, 2] if is_committed(point, victim) else [1]
    assert listed(root) == steps
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for step in steps:
        assert differences(root, step, mesh, step - 1) == []
        assert lazy_orbax.verify(root / f"{step}").is_whole

    undo, following = lazy_v1(), steps[-1] + 1
    if way == "Checkpointer":
        with v1.training.Checkpointer(root) as run:
            assert [found.step for found in run.checkpoints] == steps
            run.save(following, states.on_mesh(mesh, 9), force=True)
    else:
        v1.save(root / f"{following}", states.on_mesh(mesh, 9))
    undo()
    assert listed(root) == [*steps, following]
    assert differences(root, following, mesh, 9) == []


def listed(root):
    return sorted(int(name) for name in os.listdir(root) if name.isdecimal())


def differences(root, step, mesh, n_steps):
    """Returns what stock v1 restores otherwise than it was after `n_steps`."""
    found = v1.load(root / f"{step}", states.targets(mesh, states.SPECS))
    return states.differences(found, states.values(n_steps))
