"""What a checkpoint adds to the training loop, wherever the stall hides."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import lazy_orbax
from benchmarks import meters, workloads
from benchmarks.jobs import Channel, Job, Settings, scratch
from benchmarks.peers import DEFAULT, NONE, PEERS, Peer, manager, rotated, save_args

_WARM_STEPS = 3
MOMENTS = ("enqueued", "staged", "durable", "committed")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A loop: `saves` times one save and `steps` steps of about `step_s` seconds."""

    saves: int
    steps: int
    step_s: float
    max_to_keep: int | None = None


class StepTime(NamedTuple):
    """One step: when, in seconds since the loop began, and whether a save was in flight."""

    start_s: float
    duration_s: float
    in_flight: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """What one run of the loop took.

    Attributes:
        loop_s: wall time of the loop: its steps and its calls of `save()`.
        tail_s: wall time after the loop until the last save was committed.
        cpu_s: CPU seconds of the process, over the loop and the tail.
        saves: when `save()` was called, and how long it took.
        steps: the steps.
        moments: of each save, in seconds since `save()` was called, where the handler tells.
    """

    loop_s: float
    tail_s: float
    cpu_s: float
    saves: tuple[tuple[float, float], ...]
    steps: tuple[StepTime, ...]
    moments: tuple[dict[str, float], ...] = ()


# Long enough for the slowest peer to commit before the next save.
_SCHEDULES = {
    "full": {
        "many_small": Schedule(3, 30, 0.1),
        "few_large": Schedule(2, 60, 0.1),
        "transformer": Schedule(3, 30, 0.1),
    },
    "small": dict.fromkeys(workloads.WORKLOADS, Schedule(2, 15, 0.1)),
    "tiny": dict.fromkeys(workloads.WORKLOADS, Schedule(2, 3, 0.005)),
}


def jobs(settings: Settings) -> list[Job]:
    chosen = (NONE, *settings.peers_or("floor", *DEFAULT))
    return [
        Job(
            part="stall",
            settings=settings,
            devices=settings.devices,
            workload=workload,
            step=step,
            peers=chosen,
            ticks=settings.repeats * len(chosen),
        )
        for workload in settings.workloads_of(*workloads.WORKLOADS)
        for step in settings.steps or (("idle",) if settings.size == "tiny" else workloads.STEPS)
    ]


def measure(job: Job, channel: Channel) -> None:
    size = job.settings.size
    schedule = _SCHEDULES[size][job.workload]
    mesh = workloads.mesh_of_all_devices()
    state = workloads.build(workloads.WORKLOADS[job.workload](size), mesh)
    update = workloads.donating_update(state, mesh)
    step = workloads.STEPS[job.step](update, schedule.step_s)
    snapshot_step = lazy_orbax.SnapshotStep(update)
    copying = functools.partial(step, update=snapshot_step.with_snapshot)
    compare(job, channel, step, state, schedule, copying)


def compare(
    job: Job,
    channel: Channel,
    step: workloads.Step,
    state: Any,
    schedule: Schedule,
    copying: workloads.Step | None = None,
) -> None:
    """Runs the loop with each peer in turns, and reports what each adds.

    Args:
        job: which peers, and how often.
        channel: where to report.
        step: a step of the loop.
        state: what it begins with.
        schedule: how often to step and to save.
        copying: for peers that are `in_step`, a step that returns the next state and a copy.
    """
    loops: dict[str, list[Loop]] = {name: [] for name in job.peers}
    for repeat in range(job.settings.repeats):
        for name in rotated(job.peers, repeat):
            with scratch(job.settings) as directory:
                if name == NONE:
                    state, loop = run_loop(None, None, step, _warm(step, state), schedule)
                else:
                    peer = PEERS[name]
                    steps = (step, copying if peer.in_step else None)
                    state, loop = _run_peer(channel, peer, steps, state, schedule, directory)
            loops[name].append(loop)
            channel.tick()
    report(channel, loops, schedule)


def _warm(step: workloads.Step, state: Any) -> Any:
    for _ in range(_WARM_STEPS):
        state = step(state)
    return state


def _run_peer(
    channel: Channel,
    peer: Peer,
    steps: tuple[workloads.Step, workloads.Step | None],
    state: Any,
    schedule: Schedule,
    directory: pathlib.Path,
) -> tuple[Any, Loop]:
    step, copying = steps
    state = _warm(step, state)
    n_bytes = workloads.state_bytes(state)
    timelines: list[lazy_orbax.SaveTimeline] = []
    with manager(
        peer,
        directory,
        state_bytes=n_bytes,
        on_timeline=timelines.append,
        max_to_keep=schedule.max_to_keep,
    ) as opened:
        # The first save of a handler plans, and the first of a process compiles.
        after, state = (None, state) if copying is None else copying(state)
        start_s = time.perf_counter()
        opened.save(0, args=save_args(peer, state))
        channel.sample(peer.name, "first_save", time.perf_counter() - start_s)
        opened.wait_until_finished()
        state = state if after is None else after
        state, loop = run_loop(opened, peer, step, _warm(step, state), schedule, copying)
    moments = [
        since_call(timeline, enqueued_s=save_s)
        for timeline, (_, save_s) in zip(timelines[1:], loop.saves)
    ]
    return state, dataclasses.replace(loop, moments=tuple(moments))


def since_call(
    timeline: lazy_orbax.SaveTimeline, *, enqueued_s: float, committed_s: float = float("inf")
) -> dict[str, float]:
    """Returns the moments in seconds since `CheckpointManager.save()` was called.

    The handler's clock starts later, when Orbax calls it; by how much is known from the moments
    that both clocks saw.

    Args:
        timeline: what the handler reported.
        enqueued_s: when `save()` returned.
        committed_s: when waiting for it ended, if anybody waited.
    """
    told = {name: getattr(timeline, f"{name}_s") for name in MOMENTS}
    both = {"enqueued": enqueued_s, "committed": committed_s}
    late_s = min(both[name] - told[name] for name in both if told[name] is not None)
    moments = {name: s + max(0.0, late_s) for name, s in told.items() if s is not None}
    return moments | {"enqueued": enqueued_s}


def run_loop(
    opened: Any,
    peer: Peer | None,
    step: workloads.Step,
    state: Any,
    schedule: Schedule,
    copying: workloads.Step | None = None,
) -> tuple[Any, Loop]:
    """Trains for a while; saves at the start and every `schedule.steps` steps, if `peer` is given.

    With `copying` that is the step before the save: it returns the next state and what is saved.

    Returns:
        The state after it, and what it took.
    """
    saves: list[tuple[float, float]] = []
    steps: list[StepTime] = []
    cpu_before_s, begin_s = meters.cpu_s(), time.perf_counter()

    def save(i: int, state: Any) -> None:
        if peer is not None and i % schedule.steps == 0:
            start_s = time.perf_counter()
            opened.save(i + 1, args=save_args(peer, state))
            saves.append((start_s - begin_s, time.perf_counter() - start_s))

    for i in range(schedule.saves * schedule.steps):
        snapshot = None
        if copying is None:
            save(i, state)
        in_flight = peer is not None and opened.is_saving_in_progress()
        start_s = time.perf_counter()
        if copying is not None and i % schedule.steps == 0:
            state, snapshot = copying(state)
        else:
            state = step(state)
        steps.append(StepTime(start_s - begin_s, time.perf_counter() - start_s, in_flight))
        if snapshot is not None:
            save(i, snapshot)
    end_s = time.perf_counter()
    if peer is not None:
        opened.wait_until_finished()
    tail_s = time.perf_counter() - end_s
    cpu_s = meters.cpu_s() - cpu_before_s
    return state, Loop(end_s - begin_s, tail_s, cpu_s, tuple(saves), tuple(steps))


def report(channel: Channel, loops: dict[str, list[Loop]], schedule: Schedule) -> None:
    """Reports what each peer's loops add to those without a checkpoint."""
    plain_s = statistics.median(loop.loop_s for loop in loops[NONE])
    plain_cpu_s = statistics.median(loop.cpu_s for loop in loops[NONE])
    for name, found in loops.items():
        for loop in found:
            channel.sample(name, "loop", loop.loop_s)
            channel.sample(name, "loop_cpu", loop.cpu_s)
            if name != NONE:
                added_cpu_s = loop.cpu_s - plain_cpu_s
                channel.sample(name, "added_loop", (loop.loop_s - plain_s) / schedule.saves)
                channel.sample(name, "added_cpu", added_cpu_s / schedule.saves)
                channel.sample(name, "tail", loop.tail_s)
                channel.sample(name, "save", statistics.median(s for _, s in loop.saves))
            _report_steps(channel, name, loop, schedule)


def _report_steps(channel: Channel, name: str, loop: Loop, schedule: Schedule) -> None:
    during = [step.duration_s for step in loop.steps if step.in_flight]
    others = [step.duration_s for step in loop.steps if not step.in_flight]
    for metric, group in (("step_during_save", during), ("step_otherwise", others)):
        if group:
            channel.sample(name, f"{metric}_median", statistics.median(group))
            channel.sample(name, f"{metric}_max", max(group))
    if name != NONE:
        # Where a stall on the device shows: the step that donates what is being saved.
        after = [loop.steps[i * schedule.steps].duration_s for i in range(schedule.saves)]
        channel.sample(name, "step_after_save", statistics.median(after))
        channel.sample(name, "steps_overlapped", len(during) / schedule.saves, "steps")
    trace = {
        "saves": [list(save) for save in loop.saves],
        "steps": [list(step) for step in loop.steps],
        "moments": list(loop.moments),
    }
    channel.sample(name, "trace", None, "text", trace=trace)
