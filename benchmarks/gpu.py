"""What only an accelerator can show. It runs on CPU as well, where it proves only that it runs.

A state of N GB in leaves of 64 MiB, and a fused step: products of matrices, then an update of
every byte of the state, in one program that donates it. So a copy that holds up the state holds
up forward and backward as well, and it is the time of the step that tells.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from benchmarks import meters, stall, workloads
from benchmarks.jobs import Channel, Job, Settings, scratch
from benchmarks.peers import DEFAULT, NONE, PEERS, Peer, manager, rotated, save_args

_RAW = "raw"
_GB = 10**9
_GIGABYTES = {"full": 10.0, "small": 1.0, "tiny": 0.004}
_LEAF_SIDE = {"full": 4096, "small": 2048, "tiny": 256}
_STEP_S = {"full": 0.5, "small": 0.1, "tiny": 0.005}
_SCHEDULES = {
    # One checkpoint per 10 s. One is kept: several of this size may not fit the disk.
    "full": stall.Schedule(3, 20, _STEP_S["full"], max_to_keep=1),
    "small": stall.Schedule(3, 30, _STEP_S["small"], max_to_keep=1),
    "tiny": stall.Schedule(2, 3, _STEP_S["tiny"], max_to_keep=1),
}
_MOST_TRANSFER_BYTES = 2 * _GB
# `auto` leaves as much of the device alone.
_UNUSED_FRACTION = 0.05


def jobs(settings: Settings) -> list[Job]:
    """One process per measurement: the peak of device memory is counted per process."""
    chosen = (NONE, *settings.peers_or("floor", *DEFAULT, "lazy_stage", "lazy_direct"))
    ticks = {
        "fused_step": settings.repeats * len(chosen),
        "modes": settings.repeats * len(_WAYS),
    }
    return [
        Job(
            part="gpu",
            settings=settings,
            workload=name,
            peers=chosen if name == "fused_step" else (),
            devices=0,
            ticks=ticks.get(name, 1),
        )
        for name in settings.workloads_of(*MEASUREMENTS)
    ]


def measure(job: Job, channel: Channel) -> None:
    MEASUREMENTS[job.workload](job, channel)


def _build(settings: Settings) -> Any:
    """Returns the state, made on the devices."""
    side, mesh = _LEAF_SIDE[settings.size], workloads.mesh_of_all_devices()
    n_bytes = int((settings.gigabytes or _GIGABYTES[settings.size]) * _GB)
    make = jax.jit(
        lambda key: jax.random.normal(key, (side, side)), out_shardings=NamedSharding(mesh, P("d"))
    )
    keys = jax.random.split(jax.random.key(0), max(1, n_bytes // (4 * side**2)))
    state = {f"leaf_{i:04}": make(key) for i, key in enumerate(keys)}
    return jax.block_until_ready(state)


def _matrix(side: int) -> jax.Array:
    """Returns the matrix that a step multiplies; on each device the same."""
    everywhere = NamedSharding(workloads.mesh_of_all_devices(), P())
    return jax.device_put(jnp.eye(side, dtype=jnp.bfloat16), everywhere)


def _gradients(state: Any, x: jax.Array, count: int) -> tuple[jax.Array, None]:
    """Stands for forward and backward: products of matrices. Its gradient is one number."""
    del state
    y = jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)
    # Needs the result of the last product, so that it comes after it.
    return 1e-6 * y[0, 0].astype(jnp.float32), None


def _update(state: Any, rate: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf + rate, state)


def _body(state: Any, x: jax.Array, count: int) -> Any:
    return _update(state, _gradients(state, x, count)[0])


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start_s, result


def _calibrate(settings: Settings, state: Any) -> tuple[Any, workloads.Step, int]:
    """Returns the state, the fused donating step, and its number of products."""
    matrix = _matrix(_LEAF_SIDE[settings.size])
    fused = jax.jit(_body, donate_argnums=0)
    _, state = _timed(fused, state, matrix, 1)
    short_s, state = _timed(fused, state, matrix, 1)
    long_s, state = _timed(fused, state, matrix, 33)
    once_s = max(1e-6, (long_s - short_s) / 32)
    count = max(1, round((_STEP_S[settings.size] - short_s) / once_s))
    return state, lambda tree: jax.block_until_ready(fused(tree, matrix, count)), count


def _in_pinned_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), tree)


def _transfers(job: Job, channel: Channel) -> None:
    """The ceilings: device to device, and to the host and back, pinned and pageable."""
    n_bytes = int((job.settings.gigabytes or _GIGABYTES[job.settings.size]) * _GB)
    n_bytes = min(n_bytes, _MOST_TRANSFER_BYTES)
    device = jax.devices()[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    pinned = on_device.with_memory_kind("pinned_host")
    source = jax.block_until_ready(jax.device_put(jnp.ones(n_bytes // 4), on_device))
    copy = jax.jit(lambda x: x + 1)
    host = np.ones(n_bytes // 4, np.float32)
    for repeat in range(job.settings.repeats + 1):
        taken = {
            "device_to_device": _timed(copy, source)[0],
            "pageable_to_device": _timed(jax.device_put, host, on_device)[0],
        }
        taken["device_to_pinned"], on_host = _timed(jax.device_put, source, pinned)
        taken["pinned_to_device"] = _timed(jax.device_put, on_host, on_device)[0]
        del on_host
        fresh = jax.block_until_ready(copy(source))  # Has no copy on the host yet.
        start_s = time.perf_counter()
        np.array(fresh)
        taken["device_to_pageable"] = time.perf_counter() - start_s
        for name, value in taken.items():
            # The first time, memory is allocated and page-locked, and programs are compiled.
            metric = name if repeat else f"{name}_first"
            channel.sample(_RAW, metric, source.nbytes / value, "bytes/s")
    channel.tick()


def _view_of_pinned(job: Job, channel: Channel) -> None:
    """Whether a NumPy view of an array in pinned host memory costs a copy."""
    n_bytes = int((job.settings.gigabytes or _GIGABYTES[job.settings.size]) * _GB)
    n_bytes = min(n_bytes, _MOST_TRANSFER_BYTES)
    device = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    for _ in range(job.settings.repeats):
        array = jax.block_until_ready(jax.device_put(jnp.ones(n_bytes // 4), pinned))
        start_s = time.perf_counter()
        view = np.asarray(array)
        channel.sample(_RAW, "view_of_pinned", time.perf_counter() - start_s)
        try:
            same = view.ctypes.data == array.unsafe_buffer_pointer()
        except (RuntimeError, NotImplementedError) as error:
            channel.sample(_RAW, "view_shares_memory", f"unknown: {error}", "text")
        else:
            channel.sample(_RAW, "view_shares_memory", float(same), "ratio")
        del view, array
    channel.tick()


def _fused_step(job: Job, channel: Channel) -> None:
    """The stall of each peer: the same comparison as `stall`, with a fused step."""
    state, step, _ = _calibrate(job.settings, _build(job.settings))
    channel.sample(_RAW, "state", workloads.state_bytes(state), "bytes")
    stall.compare(job, channel, step, state, _SCHEDULES[job.settings.size])


_Span = tuple[float, float]


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


_WAYS = (NONE, "lazy_stage", "lazy_direct", "no_donation", "split", "in_step")


def _modes(job: Job, channel: Channel) -> None:
    """The stall of each mode, in turns: a fused step, without donation, split, in-step."""
    state, fused, count = _calibrate(job.settings, _build(job.settings))
    ways = _ways(fused, _matrix(_LEAF_SIDE[job.settings.size]), count)
    schedule = _SCHEDULES[job.settings.size]
    channel.sample(_RAW, "state", workloads.state_bytes(state), "bytes")
    loops: dict[str, list[stall.Loop]] = {name: [] for name in _WAYS}
    for repeat in range(job.settings.repeats):
        for name in rotated(_WAYS, repeat):
            if name == NONE:
                state, loop = stall.run_loop(None, None, fused, fused(state), schedule)
            else:
                state, loop = _run_way(job, channel, name, ways[name], state)
            loops[name].append(loop)
            channel.tick()
    stall.report(channel, loops, schedule)


def _ways(fused: workloads.Step, matrix: jax.Array, count: int) -> dict[str, _Way]:
    keeping = jax.jit(_body)
    split = lazy_orbax.split_step(_gradients, _update)
    in_step = lazy_orbax.SnapshotStep(_body)

    def copying(state: Any) -> tuple[Any, Any]:
        after, snapshot = in_step.with_snapshot(state, matrix, count)
        return jax.block_until_ready(after), snapshot

    return {
        "lazy_stage": _Way(PEERS["lazy_stage"], fused),
        "lazy_direct": _Way(PEERS["lazy_direct"], fused),
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
    schedule = _SCHEDULES[job.settings.size]
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


def _in_step(job: Job, channel: Channel) -> None:
    """Whether a copy to the host inside the step hides behind its compute."""
    state, step, count = _calibrate(job.settings, _build(job.settings))
    targets = _in_pinned_host(state)
    matrix = _matrix(_LEAF_SIDE[job.settings.size])

    def with_copy(tree: Any, x: jax.Array, n: int) -> Any:
        return _body(tree, x, n), jax.device_put(tree, targets)

    copying = jax.jit(with_copy, donate_argnums=0)
    for peer, program in (("in_step", copying), (_RAW, jax.jit(_body, donate_argnums=0))):
        # Whether the compiler copies on the device first, because the state is updated in place.
        memory = program.lower(state, matrix, count).compile().memory_analysis()
        if memory is not None:
            channel.sample(peer, "temporary_device_memory", memory.temp_size_in_bytes, "bytes")
    state, copied = copying(state, matrix, count)
    del copied
    for _ in range(job.settings.repeats):
        plain_s, state = _timed(step, state)
        copy_s, copied = _timed(jax.device_put, state, targets)
        del copied
        both_s, (state, copied) = _timed(copying, state, matrix, count)
        del copied
        channel.sample(_RAW, "step", plain_s)
        channel.sample(_RAW, "copy_alone", copy_s)
        channel.sample("in_step", "step_with_copy", both_s)
        # 1: hidden completely. 0: one after the other.
        channel.sample("in_step", "copy_hidden", (plain_s + copy_s - both_s) / copy_s, "ratio")
    channel.tick()


def _headroom(job: Job, channel: Channel) -> None:
    """What `auto` does when only half of the state fits beside it on the device."""
    state, step, _ = _calibrate(job.settings, _build(job.settings))
    n_bytes = workloads.state_bytes(state)
    ballast = _ballast(n_bytes // 2)
    if not ballast:
        why = "not restricted: the device is full already, or does not count its memory"
        channel.sample("lazy", "headroom", why, "text")
    plain_s, state = _timed(step, state)
    timelines: queue.SimpleQueue[lazy_orbax.SaveTimeline] = queue.SimpleQueue()
    peer, on_timeline = PEERS["lazy"], timelines.put
    with (
        scratch(job.settings) as directory,
        manager(
            peer, directory, state_bytes=n_bytes, on_timeline=on_timeline, max_to_keep=1
        ) as opened,
    ):
        for i in range(1 + job.settings.repeats):
            start_s = time.perf_counter()
            opened.save(i, args=save_args(peer, state))
            save_s = time.perf_counter() - start_s
            step_s, state = _timed(step, state)
            opened.wait_until_finished()
            timeline = timelines.get(timeout=60)
            if i:  # The first one compiles.
                channel.sample("lazy", "save", save_s)
                channel.sample("lazy", "step_otherwise_median", plain_s)
                channel.sample("lazy", "step_after_save", step_s)
                channel.sample("lazy", "waited", timeline.waited_s)
                channel.sample("lazy", "mode", timeline.mode, "text")
    del ballast
    channel.tick()


def _ballast(free_bytes: int) -> list[jax.Array]:
    """Fills each device until only its share of `free_bytes` is left. Empty where none counts."""
    devices = jax.local_devices()
    ballast = []
    for device in devices:
        stats = device.memory_stats()
        if not stats:
            return []
        # What the step takes at its peak is not free.
        used = max(stats["peak_bytes_in_use"], stats["bytes_in_use"])
        left = free_bytes // len(devices) + int(_UNUSED_FRACTION * stats["bytes_limit"])
        n_bytes = stats["bytes_limit"] - used - left
        if n_bytes > 0:
            ballast.append(jnp.zeros(n_bytes, jnp.uint8, device=device))
    return jax.block_until_ready(ballast)


MEASUREMENTS: dict[str, Callable[[Job, Channel], None]] = {
    "transfers": _transfers,
    "view_of_pinned": _view_of_pinned,
    "fused_step": _fused_step,
    "modes": _modes,
    "in_step": _in_step,
    "headroom": _headroom,
}
