"""How fast the bytes get there and back: staged, durable, committed, restored."""

from __future__ import annotations

import pathlib
import queue
import time
from typing import Any

import jax

import lazy_orbax
from benchmarks import ceilings, meters, stall, workloads
from benchmarks.jobs import Channel, Job, Settings, scratch
from benchmarks.peers import DEFAULT, PEERS, Peer, manager, restore_args, rotated, save_args

_TIMELINE_TIMEOUT_S = 10


def jobs(settings: Settings) -> list[Job]:
    chosen = settings.peers_or(*DEFAULT)
    return [
        Job(
            part="throughput",
            settings=settings,
            devices=settings.devices,
            workload=workload,
            peers=chosen,
            ticks=settings.repeats * (len(chosen) + 1),
        )
        for workload in settings.workloads_of(*workloads.WORKLOADS)
    ]


def measure(job: Job, channel: Channel) -> None:
    mesh = workloads.mesh_of_all_devices()
    state = workloads.build(workloads.WORKLOADS[job.workload](job.settings.size), mesh)
    update = workloads.donating_update(state, mesh)
    channel.sample(ceilings.RAW, "state", workloads.state_bytes(state), "bytes")
    for repeat in range(job.settings.repeats):
        with scratch(job.settings) as directory:
            ceilings.measure(channel, directory, state)
        channel.tick()
        for name in rotated(job.peers, repeat):
            with scratch(job.settings) as directory:
                state = _save(channel, PEERS[name], directory, update, state)
                _restore(channel, PEERS[name], directory, state)
            channel.tick()


def _save(
    channel: Channel, peer: Peer, directory: pathlib.Path, update: workloads.Step, state: Any
) -> Any:
    """Saves once to warm up and once to measure. Nothing else runs."""
    timelines: queue.SimpleQueue[lazy_orbax.SaveTimeline] = queue.SimpleQueue()
    n_bytes = workloads.state_bytes(state)
    with manager(peer, directory, state_bytes=n_bytes, on_timeline=timelines.put) as opened:
        opened.save(0, args=save_args(peer, state))
        opened.wait_until_finished()
        state = jax.block_until_ready(update(state))
        cpu_before_s, start_s = meters.cpu_s(), time.perf_counter()
        opened.save(1, args=save_args(peer, state))
        enqueued_s = time.perf_counter() - start_s
        opened.wait_until_finished()
        committed_s = time.perf_counter() - start_s
        channel.sample(peer.name, "cpu", meters.cpu_s() - cpu_before_s)
    moments = {"enqueued": enqueued_s, "committed": committed_s}
    if peer.name.startswith("lazy"):
        timeline = [timelines.get(timeout=_TIMELINE_TIMEOUT_S) for _ in range(2)][-1]
        moments = (
            stall.since_call(timeline, enqueued_s=enqueued_s, committed_s=committed_s) | moments
        )
    for name, value in moments.items():
        channel.sample(peer.name, name, value)
    channel.sample(peer.name, "timeline", None, "text", trace=moments)
    channel.sample(peer.name, "disk", meters.disk_bytes(directory / "1"), "bytes")
    channel.sample(peer.name, "files", len(meters.files_under(directory / "1")), "files")
    return state


def _restore(channel: Channel, peer: Peer, directory: pathlib.Path, state: Any) -> None:
    """Restores what was just saved, from storage and not from the page cache."""
    n_bytes = workloads.state_bytes(state)
    meters.drop_from_page_cache(directory)
    with manager(peer, directory, state_bytes=n_bytes) as opened:
        start_s = time.perf_counter()
        jax.block_until_ready(opened.restore(1, args=restore_args(peer, state)))
        channel.sample(peer.name, "restore", time.perf_counter() - start_s)
