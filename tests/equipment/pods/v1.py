"""Scenarios of several processes that save with Orbax v1."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from equipment.gates import failing_at
from equipment.pods import states
from equipment.pods.kill_points import killing
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax.handlers.v1 import lazy_v1
from lazy_orbax.snapshot.host_budget import HOST_BUDGET


def _why(call: Callable[[], Any]) -> str:
    """Returns what a call fails with, or an empty string."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - It is reported.
        return f"{type(error).__name__}: {error}"
    return ""


def _failing_on_the_last(call: Callable[[], Any]) -> str:
    if jax.process_index() == jax.process_count() - 1:
        with failing_at("finish"):
            return _why(call)
    return _why(call)


def main(root: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Saves steps that are donated at once, and others that fail on the last process."""
    lines: list[lazy_orbax.SaveTimeline] = []
    undo = lazy_v1(lazy_orbax.LazyOptions(slab_bytes=2**20, on_timeline=lines.append))
    state = states.on_mesh(mesh, 0)
    step = states.training_step(state)
    report: dict[str, Any] = {}
    for n in (1, 2, 3):
        state = step(state)
        response = v1.save_async(root / "functions" / f"{n}", state)
        state = step(step(state))
        response.result()
    report["function"] = _failing_on_the_last(lambda: v1.save(root / "functions" / "4", state))
    report["again"] = _why(lambda: v1.save(root / "functions" / "4", state))
    with v1.training.Checkpointer(root / "run") as checkpointer:
        for n in (1, 2):
            both = {"state": state, "more": {"step": state["step"], "text": "Grüße"}}
            checkpointer.save_checkpointables_async(n, both, force=True)
            state = step(step(step(state)))
            checkpointer.wait()
        report["checkpointer"] = _failing_on_the_last(
            lambda: checkpointer.save(3, state, force=True)
        )
        _why(checkpointer.wait)  # Orbax tells of it twice.
        report["saved"] = checkpointer.save(4, state, force=True)
        report["steps"] = [found.step for found in checkpointer.checkpoints]
    targets = states.targets(mesh, states.OTHER_SPECS)
    found = v1.load(root / "functions" / "3", targets)
    report["wrong"] = states.differences(found, states.values(7))
    ocp.multihost.sync_global_processes("the end")
    report["left"] = sorted(str(path) for path in root.rglob("*orbax-checkpoint-tmp*"))
    report["directories"] = sorted(os.listdir(root / "functions"))
    report["committed"] = [
        os.path.basename(os.path.dirname(line.directory))
        for line in lines
        if line.committed_s is not None
    ]
    report["failed"] = sum(line.error is not None for line in lines)
    report["lines"] = len(lines)
    report["in_flight"] = HOST_BUDGET.in_flight_bytes
    undo()
    return report


@dataclasses.dataclass(frozen=True)
class Kill:
    """Who is killed in the second save, and when.

    Attributes:
        point: one of `kill_points`.
        watched: the process that comes to it.
        victim: the process that is killed then.
        pids: a directory in which every process writes its own.
    """

    point: str
    watched: int
    victim: int
    pids: str


def killed(root: pathlib.Path, mesh: jax.sharding.Mesh, way: str, kill: Kill) -> None:
    """Saves step 1 and dies in step 2, by `save` or by a `Checkpointer`."""
    me = jax.process_index()
    (pathlib.Path(kill.pids) / f"{me}").write_text(str(os.getpid()))
    lazy_v1(lazy_orbax.LazyOptions(slab_bytes=2**20))
    state = states.on_mesh(mesh, 0)
    step = states.training_step(state)
    run = v1.training.Checkpointer(root) if way == "Checkpointer" else None
    save = run.save_async if run else lambda n, tree: v1.save_async(root / f"{n}", tree)
    save(1, state).result()
    state = step(state)
    victim_pid = int((pathlib.Path(kill.pids) / f"{kill.victim}").read_text())
    with killing(kill.point, victim_pid) if me == kill.watched else contextlib.nullcontext():
        save(2, state).result()
        # Nobody passes here: a process that the kill did not reach waits for it to arrive.
        jax.block_until_ready(step(state))
        ocp.multihost.sync_global_processes("the end")


def preempted(root: pathlib.Path, mesh: jax.sharding.Mesh, signalled: int) -> dict[str, Any]:
    """One process gets SIGTERM: both agree on a step, save it with a `Checkpointer`, and leave."""
    undo = lazy_v1()
    state = states.on_mesh(mesh, 0)
    step = states.training_step(state)
    with (
        lazy_orbax.Preemption(grace_s=60) as preemption,
        v1.training.Checkpointer(root) as checkpointer,
    ):
        for n in itertools.count(1):
            state = step(state)
            ocp.multihost.sync_global_processes(f"step {n}")
            if n == 2 and jax.process_index() == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.reached(checkpointer, n):
                break
        last = preemption.last_save(checkpointer, n, args={"state": state})
    undo()
    return {**dataclasses.asdict(last), "error": repr(last.error)}
