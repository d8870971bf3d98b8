"""What many saves take from the host, and from the device, above what the state itself takes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from benchmarks import meters, workloads
from benchmarks.jobs import Channel, Job, Settings, scratch
from benchmarks.peers import DEFAULT, PEERS, Peer, manager, quarter_bytes, save_args

_SAVES = {"full": 20, "small": 10, "tiny": 4}
_MOST_PROCESSES = 3
_STEP_S = 0.02


def jobs(settings: Settings) -> list[Job]:
    """One process per peer, since memory that a process was given it may keep."""
    return [
        Job(
            part="memory",
            settings=settings,
            devices=settings.devices,
            workload=workload,
            peers=(name,),
            ticks=_SAVES[settings.size],
        )
        for _ in range(min(settings.repeats, _MOST_PROCESSES))
        for workload in settings.workloads_of("many_small", "few_large")
        for name in settings.peers_or(*DEFAULT, "lazy_quarter")
    ]


def measure(job: Job, channel: Channel) -> None:
    peer = PEERS[job.peers[0]]
    mesh = workloads.mesh_of_all_devices()
    state = workloads.build(workloads.WORKLOADS[job.workload](job.settings.size), mesh)
    n_bytes = workloads.state_bytes(state)
    step = workloads.idle_step(workloads.donating_update(state, mesh), _STEP_S)
    state = step(step(state))
    channel.sample(peer.name, "state", n_bytes, "bytes")
    if peer.name == "lazy_quarter":
        channel.sample(peer.name, "budget", quarter_bytes(n_bytes), "bytes")
    with scratch(job.settings) as directory:
        # A few tiny leaves: what is imported and started once is nobody's snapshot.
        few = workloads.build(workloads.tiny_leaves(4), mesh)
        with manager(peer, directory / "warm", state_bytes=n_bytes) as opened:
            opened.save(0, args=save_args(peer, few))
        _save_often(job, channel, peer, directory, step, state)


@dataclasses.dataclass(frozen=True)
class _Baseline:
    """What is in use before the first save that counts."""

    rss_bytes: int
    kernel_counts: bool
    device_bytes: int | None

    @classmethod
    def now(cls) -> _Baseline:
        meters.release_free_memory()
        in_use = _device_bytes("bytes_in_use")
        return cls(meters.rss_bytes(), meters.reset_kernel_peak(), in_use)


def _device_bytes(name: str) -> int | None:
    """A number of the fullest device, where the backend counts; the CPU's does not."""
    found = [device.memory_stats() for device in jax.local_devices()]
    return max(stats[name] for stats in found if stats) if any(found) else None


def _save_often(
    job: Job,
    channel: Channel,
    peer: Peer,
    directory: pathlib.Path,
    step: workloads.Step,
    state: Any,
) -> None:
    n_saves, n_bytes = _SAVES[job.settings.size], workloads.state_bytes(state)
    after: list[int] = []
    baseline = _Baseline.now()
    with (
        meters.RssSampler() as sampler,
        manager(peer, directory / "run", state_bytes=n_bytes, max_to_keep=2) as opened,
    ):
        for i in range(n_saves):
            opened.save(i, args=save_args(peer, state))
            state = step(state)
            while opened.is_saving_in_progress():
                state = step(state)
            opened.wait_until_finished()
            after.append(meters.rss_bytes() - baseline.rss_bytes)
            channel.tick()
    peak = meters.kernel_peak_bytes() if baseline.kernel_counts else sampler.peak_bytes
    channel.sample(peer.name, "peak", peak - baseline.rss_bytes, "bytes")
    channel.sample(peer.name, "peak_sampled", sampler.peak_bytes - baseline.rss_bytes, "bytes")
    # From the fifth save or so on, what is kept once has been.
    settled = min(5, n_saves // 2)
    channel.sample(peer.name, "growth", after[-1] - after[settled], "bytes")
    channel.sample(peer.name, "kept_first", after[0], "bytes")
    channel.sample(peer.name, "kept", after[-1], "bytes", trace=after)
    meters.release_free_memory()
    # Without what the allocator keeps for the next time.
    channel.sample(peer.name, "in_use", meters.rss_bytes() - baseline.rss_bytes, "bytes")
    if baseline.device_bytes is not None:
        device_peak = _device_bytes("peak_bytes_in_use")
        channel.sample(
            peer.name, "device_peak", (device_peak or 0) - baseline.device_bytes, "bytes"
        )
