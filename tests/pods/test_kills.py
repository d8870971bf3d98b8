"""A process is killed at exact points of a save: what was committed stays, nothing else shows."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.daily import every
from equipment.pods import states
from equipment.pods.jobs import assert_killed, ends_of, start_job
from equipment.pods.kill_points import ON_EACH, ON_PRIMARY, is_committed

import lazy_orbax

# How many processes, the point, who comes to it, who is killed then. Every point at least once,
# and at least twelve for process 0 and for others.
OF_THE_PRIMARY = [
    *((2, point, 0, 0) for point in (*ON_EACH[::2], "after the finish", "after the telling")),
    *((2, point, 0, 0) for point in ON_PRIMARY),
]
OF_ANOTHER = [
    *((2, point, 1, 1) for point in ON_EACH[1::2]),
    *((2, point, 0, 1) for point in ON_PRIMARY),
    (4, "before the finish", 3, 3),
    (4, "before the merge", 0, 2),
]
# Who survives another than process 0 waits some seconds to miss it: several jobs wait together.
_TOGETHER = 3
GROUPS = [OF_ANOTHER[i : i + _TOGETHER] for i in range(0, len(OF_ANOTHER), _TOGETHER)]


def restored(root, step, mesh):
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        target = states.targets(mesh, states.SPECS)
        return stock.restore(step, args=ocp.args.StandardRestore(target))


@pytest.mark.parametrize("case", every(2, OF_THE_PRIMARY), ids=str)
def test_the_primary_is_killed(tmp_path, case):
    [ended] = ends_of([start(tmp_path, *case)])
    check(tmp_path, ended, *case)


@pytest.mark.parametrize("cases", every(2, GROUPS), ids=lambda cases: "; ".join(map(str, cases)))
def test_another_process_is_killed(tmp_path, cases, subtests):
    places = [tmp_path / str(i) for i in range(len(cases))]
    jobs = [start(place, *case) for place, case in zip(places, cases, strict=True)]
    for place, case, ended in zip(places, cases, ends_of(jobs), strict=True):
        with subtests.test(str(case)):
            check(place, ended, *case)


def start(place, n, point, watched, victim):
    pids = place / "pids"
    pids.mkdir(parents=True)
    told = {"point": point, "watched": watched, "victim": victim, "pids": str(pids)}
    return start_job(n, "killed", place / "run", logs=place, **told)


def check(place, ended, n, point, watched, victim):
    root = place / "run"
    assert_killed(ended, victim)
    committed = is_committed(point, victim)
    steps = [1, 2] if committed else [1]
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    with ocp.CheckpointManager(root, item_handlers=lazy_orbax.standard_handler()) as manager:
        assert manager.all_steps() == steps
        newest = restored(root, steps[-1], mesh)
        assert states.differences(newest, states.values(steps[-1] - 1)) == []
        following = 3 if committed else 2
        manager.save(following, args=ocp.args.StandardSave(states.on_mesh(mesh, 9)))
        manager.wait_until_finished()
        assert manager.all_steps() == [*steps, following]
    assert states.differences(restored(root, following, mesh), states.values(9)) == []
