"""Jobs of several processes that save to `gs://`: twenty saves, and processes that are killed."""

from __future__ import annotations

import signal

import pytest
from equipment.daily import every
from equipment.pods import states
from equipment.pods.jobs import HEARTBEAT_TIMEOUT_S, reports, run_job

_SLACK_S = 10  # Of a machine with fewer cores than processes.


@pytest.fixture(scope="module")
def witness(start_for_module):
    """A single process, which only knows the address."""
    return start_for_module()


@pytest.fixture
def job(tmp_path, root, environment):
    """Runs a scenario of `equipment/pods/child.py`."""

    def run(n, scenario, **told):
        return run_job(n, scenario, root, logs=tmp_path, variables=environment, **told)

    return run


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_twenty_saves_of_states_that_are_donated_at_once(n, root, witness, proxy, job):
    processes = reports(job(n, "twenty_saves"))
    steps = list(range(1, 21))
    assert [process["steps"] for process in processes] == [steps] * n
    assert [process["in_flight"] for process in processes] == [0] * n
    assert all(set(process["moved"]) <= {1} for process in processes)
    for step, written in enumerate(zip(*(p["bytes"] for p in processes), strict=True), start=1):
        assert sum(written) == states.N_BYTES, step
        assert max(written) < 1.25 * states.N_BYTES / n, written
    name = root.rpartition("/")[2]
    for i in range(n):
        assert any(f"{name}/20/default/ocdbt.process_{i}/d/" in line for line in proxy.lines)
    assert witness.do("open", root, stock=True) == steps
    for step in steps:
        # Two more training steps follow each save, before the next.
        assert witness.do("differences", step, 3 * step - 2) == [], step


# The point, who comes to it, who is killed then: at least six points for each.
CASES = [
    ("before the snapshot", 0, 0),
    ("after the snapshot", 1, 1),
    ("before the transfer of a slab", 0, 0),
    ("before the opening of the store", 1, 1),
    ("before the hand-over of a slab", 0, 0),
    ("after the hand-over of a slab", 1, 1),
    ("before the finish", 0, 0),
    ("before the telling", 1, 1),
    ("after the telling", 1, 1),
    ("before the merge", 0, 0),
    ("before the validation of the merge", 0, 1),
    ("before the commit", 0, 0),
    ("after the commit", 0, 0),
]


@pytest.mark.parametrize("case", every(2, CASES), ids=lambda case: f"{case[0]}: {case[2]}")
def test_a_process_is_killed(case, tmp_path, root, witness, job, tell):
    point, watched, victim = case
    ended = job(2, "killed", point=point, watched=watched, victim=victim, pids=str(tmp_path))
    killed, survivor = ended[victim], ended[1 - victim]
    assert killed.returncode == -signal.SIGKILL, killed.log[-4000:]
    # JAX ends the other: at once if it was process 0, else when it is missed.
    outlived_s = survivor.ended_s - killed.ended_s
    assert survivor.report is None
    assert outlived_s < HEARTBEAT_TIMEOUT_S + _SLACK_S

    steps = [1, 2] if point == "after the commit" else [1]
    assert witness.do("open", root, stock=True) == steps
    assert witness.do("differences", steps[-1], steps[-1] - 1) == []
    witness.do("open", root)
    following = steps[-1] + 1
    witness.do("save", following)
    assert witness.do("open", root, stock=True) == [*steps, following]
    assert witness.do("wrong", following) == []
    assert witness.do("differences", steps[-1], steps[-1] - 1) == []
    who = f"process {victim} killed"
    tell("Processes killed on gs://", point, who, f"newest step: {steps[-1]}")
