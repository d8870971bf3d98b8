"""What only an accelerator can show. It runs on CPU as well, where it proves only that it runs.

A state of N GB in leaves of 64 MiB, and a fused step: products of matrices, then an update of
every byte of the state, in one program that donates it. So a copy that holds up the state holds
up forward and backward as well, and it is the time of the step that tells.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu.overlap import in_step
from benchmarks.gpu.raw_copies import transfers, view_of_pinned
from benchmarks.gpu.room import headroom
from benchmarks.gpu.stalls import WAYS, fused_step, modes
from benchmarks.jobs import Channel, Job, Settings
from benchmarks.peers import DEFAULT, NONE

MEASUREMENTS: dict[str, Callable[[Job, Channel], None]] = {
    "transfers": transfers,
    "view_of_pinned": view_of_pinned,
    "fused_step": fused_step,
    "modes": modes,
    "in_step": in_step,
    "headroom": headroom,
}


def jobs(settings: Settings) -> list[Job]:
    """One process per measurement: the peak of device memory is counted per process."""
    chosen = (NONE, *settings.peers_or("floor", *DEFAULT, "lazy_stage", "lazy_direct"))
    ticks = {
        "fused_step": settings.repeats * len(chosen),
        "modes": settings.repeats * len(WAYS),
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
