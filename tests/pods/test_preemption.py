"""SIGTERM to one process of a job, and to all: they agree on a step, save it and leave."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.pods import states
from equipment.pods.jobs import reports, run_job


@pytest.mark.parametrize(
    ("signalled", "saves"), [([1], True), ([0, 1], False)], ids=["one process", "all"]
)
def test_all_processes_save_the_same_last_step(tmp_path, signalled, saves):
    """`saves`: the loop calls `manager.save` at each step, which saves the last one itself."""
    root = tmp_path / "run"
    ended = run_job(2, "preempted", root, logs=tmp_path, signalled=signalled, saves=saves)
    found = reports(ended)
    assert [process.returncode for process in ended] == [0, 0]
    step = found[0]["reached"]
    assert step > 2
    for process in found:
        last = process["last"]
        assert process["slow"], "the save of step 1 was not in flight when the signal came"
        assert process["hurried"]
        assert (process["reached"], last["step"], last["newest_step"]) == (step, step, step)
        assert last["committed"], last["error"]
        assert last["in_flight"] == (step if saves else 1) or last["in_flight"] is None
        assert last["taken_s"] < 30  # The save in flight alone would have taken a minute.
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == [1, step]
        for saved in (1, step):
            target = states.targets(mesh, states.SPECS)
            restored = stock.restore(saved, args=ocp.args.StandardRestore(target))
            assert states.differences(restored, states.values(saved)) == []
