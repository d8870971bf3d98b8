"""The stall of each peer and of each mode, by the time of the step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

import lazy_orbax
from benchmarks import meters, stall, workloads
from benchmarks.gpu import fused
from benchmarks.jobs import Channel, Job, scratch
from benchmarks.peers import NONE, PEERS, Peer, manager, rotated, save_args

WAYS = (NONE, "lazy_stage", "lazy_direct", "no_donation", "split", "in_step")
_Span = tuple[float, float]


def fused_step(job: Job, channel: Channel) -> None:
    """The stall of each peer: the same comparison as `stall`, with a fused step."""
    state, step, _ = fused.calibrate(job.settings, fused.build(job.settings))
    channel.sample(fused.RAW, "state", workloads.state_bytes(state), "bytes")
    stall.compare(job, channel, step, state, fused.SCHEDULES[job.settings.size])


@dataclasses.dataclass(frozen=True)
class _Way:
    """One way to train and save.

    Attributes:
        peer: whose handler saves.
        step: takes the state, returns the next one when that is computed.
        copying: the step to save with, where the step makes the copy; else the state is saved.
    """

    peer: Peer
    step: workloads.Step
    copying: Callable[[Any], tuple[Any, Any]] | None = None


def modes(job: Job, channel: Channel) -> None:
    """The stall of each mode, in turns: a fused step, without donation, split, in-step."""
    state, step, count = fused.calibrate(job.settings, fused.build(job.settings))
    ways = _ways(step, fused.matrix_of(job.settings), count)
    schedule = fused.SCHEDULES[job.settings.size]
    channel.sample(fused.RAW, "state", workloads.state_bytes(state), "bytes")
    loops: dict[str, list[stall.Loop]] = {name: [] for name in WAYS}
    for repeat in range(job.settings.repeats):
        for name in rotated(WAYS, repeat):
            if name == NONE:
                state, loop = stall.run_loop(None, None, step, step(state), schedule)
            else:
                state, loop = _run_way(job, channel, name, ways[name], state)
            loops[name].append(loop)
            channel.tick()
    stall.report(channel, loops, schedule)


def _ways(step: workloads.Step, matrix: jax.Array, count: int) -> dict[str, _Way]:
    keeping = jax.jit(fused.body)
    split = lazy_orbax.split_step(fused.gradients, fused.update)
    in_step = lazy_orbax.SnapshotStep(fused.body)

    def copying(state: Any) -> tuple[Any, Any]:
        after, snapshot = in_step.with_snapshot(state, matrix, count)
        return jax.block_until_ready(after), snapshot

    return {
        "lazy_stage": _Way(PEERS["lazy_stage"], step),
        "lazy_direct": _Way(PEERS["lazy_direct"], step),
        "no_donation": _Way(
            PEERS["lazy_direct"],
            lambda state: jax.block_until_ready(keeping(state, matrix, count)),
        ),
        "split": _Way(
            PEERS["lazy_direct"],
            lambda state: jax.block_until_ready(split(state, matrix, count)[0]),
        ),
        "in_step": _Way(
            PEERS["lazy"],
            lambda state: jax.block_until_ready(in_step(state, matrix, count)),
            copying,
        ),
    }


def _run_way(
    job: Job, channel: Channel, name: str, way: _Way, state: Any
) -> tuple[Any, stall.Loop]:
    schedule = fused.SCHEDULES[job.settings.size]
    timelines: list[lazy_orbax.SaveTimeline] = []
    n_bytes = workloads.state_bytes(state)
    with (
        scratch(job.settings) as directory,
        manager(
            way.peer,
            directory,
            state_bytes=n_bytes,
            on_timeline=timelines.append,
            max_to_keep=schedule.max_to_keep,
        ) as opened,
    ):
        state = way.step(state)
        state, _, _ = _save_and_step(way, opened, 0, state)  # Plans and compiles.
        opened.wait_until_finished()
        state, loop = _loop(way, opened, way.step(state), schedule)
    for timeline in timelines[1:]:
        channel.sample(name, "mode", f"{timeline.mode} ({timeline.reason})", "text")
    moments = [
        stall.since_call(timeline, enqueued_s=save_s)
        for timeline, (_, save_s) in zip(timelines[1:], loop.saves)
    ]
    return state, dataclasses.replace(loop, moments=tuple(moments))


def _save_and_step(way: _Way, opened: Any, i: int, state: Any) -> tuple[Any, _Span, _Span]:
    """Returns the next state, and of `save()` and of the step when it began and what it took."""
    start_s = time.perf_counter()
    if way.copying is None:
        opened.save(i, args=save_args(way.peer, state))
        between_s = time.perf_counter()
        state = way.step(state)
        end_s = time.perf_counter()
        return state, (start_s, between_s - start_s), (between_s, end_s - between_s)
    state, snapshot = way.copying(state)
    between_s = time.perf_counter()
    opened.save(i, args=save_args(way.peer, snapshot))
    end_s = time.perf_counter()
    return state, (between_s, end_s - between_s), (start_s, between_s - start_s)


def _loop(way: _Way, opened: Any, state: Any, schedule: stall.Schedule) -> tuple[Any, stall.Loop]:
    """As `stall.run_loop`, but the step that saves may be another one."""
    saves: list[_Span] = []
    steps: list[stall.StepTime] = []
    cpu_before_s, begin_s = meters.cpu_s(), time.perf_counter()
    for i in range(schedule.saves * schedule.steps):
        in_flight = i % schedule.steps == 0 or opened.is_saving_in_progress()
        start_s = time.perf_counter()
        if i % schedule.steps == 0:
            state, save, (start_s, step_s) = _save_and_step(way, opened, i + 1, state)
            saves.append((save[0] - begin_s, save[1]))
        else:
            state = way.step(state)
            step_s = time.perf_counter() - start_s
        steps.append(stall.StepTime(start_s - begin_s, step_s, in_flight))
    end_s = time.perf_counter()
    opened.wait_until_finished()
    tail_s = time.perf_counter() - end_s
    cpu_s = meters.cpu_s() - cpu_before_s
    return state, stall.Loop(end_s - begin_s, tail_s, cpu_s, tuple(saves), tuple(steps))
