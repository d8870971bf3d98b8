"""How the cost grows with the number of leaves, and with the number of devices."""

from __future__ import annotations

import time

from benchmarks import meters, workloads
from benchmarks.jobs import Channel, Job, Settings, scratch
from benchmarks.peers import PEERS, manager, save_args

_LEAVES = {
    "full": (10, 100, 1000, 5000, 20_000),
    "small": (10, 100, 1000),
    "tiny": (10,),
}
_DEVICES = {"full": (1, 4, 16), "small": (1, 4, 16), "tiny": (4,)}
_USUAL_DEVICES = 4
_USUAL_LEAVES = {"full": 1000, "small": 100, "tiny": 10}
_LATER_SAVES = {"full": 5, "small": 3, "tiny": 2}
# Stock Orbax takes a minute for a save of 20,000 leaves.
_MANY_LEAVES, _FEW_LATER_SAVES = 5000, 2
_MOST_PROCESSES = 3


def jobs(settings: Settings) -> list[Job]:
    """One process per cell: the number of devices is fixed at start, programs compile once."""
    size = settings.size
    cells = [(leaves, _USUAL_DEVICES) for leaves in _LEAVES[size]]
    cells += [(_USUAL_LEAVES[size], n) for n in _DEVICES[size] if n != _USUAL_DEVICES]
    return [
        Job(
            part="scale",
            settings=settings,
            workload=f"{leaves} leaves, {devices} device{'s' * (devices > 1)}",
            peers=(name,),
            devices=devices,
            ticks=1 + _later_saves(size, leaves),
        )
        for _ in range(min(settings.repeats, _MOST_PROCESSES))
        for leaves, devices in cells
        for name in settings.peers_or("stock_default", "stock_best", "lazy")
    ]


def _later_saves(size: str, leaves: int) -> int:
    return _FEW_LATER_SAVES if leaves >= _MANY_LEAVES else _LATER_SAVES[size]


def measure(job: Job, channel: Channel) -> None:
    peer = PEERS[job.peers[0]]
    leaves = int(job.workload.split()[0])
    mesh = workloads.mesh_of_all_devices()
    state = workloads.build(workloads.tiny_leaves(leaves), mesh)
    n_bytes = workloads.state_bytes(state)
    with (
        scratch(job.settings) as directory,
        manager(peer, directory, state_bytes=n_bytes) as opened,
    ):
        for i in range(job.ticks):
            which = "later" if i else "first"
            cpu_before_s, start_s = meters.cpu_s(), time.perf_counter()
            opened.save(i, args=save_args(peer, state))
            channel.sample(peer.name, f"{which}_save", time.perf_counter() - start_s)
            opened.wait_until_finished()
            channel.sample(peer.name, f"{which}_committed", time.perf_counter() - start_s)
            channel.sample(peer.name, f"{which}_cpu", meters.cpu_s() - cpu_before_s)
            channel.tick()
