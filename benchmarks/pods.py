"""What a checkpoint costs when several processes, each with devices of its own, write it together.

The processes run on this machine and share its cores and its disk, so this shows what they pay to
work together, not how fast a pod is.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from benchmarks import meters, workloads
from benchmarks.jobs import Channel, Job, Settings, environment
from benchmarks.peers import DEFAULT, PEERS, manager, rotated, save_args

_PROCESSES = {"full": (2, 4), "small": (2, 4), "tiny": (2,)}
_DEVICES_OF_EACH = 2
_WORKLOADS = ("many_small", "transformer")
TOLD = "SAMPLE "
"""What a line begins with that has a sample."""


def jobs(settings: Settings) -> list[Job]:
    chosen = settings.peers_or(*DEFAULT)
    return [
        Job(
            part="pods",
            settings=settings,
            devices=_DEVICES_OF_EACH,
            workload=f"{workload}, {n} processes",
            peers=chosen,
            ticks=settings.repeats * len(chosen),
        )
        for workload in settings.workloads_of(*_WORKLOADS)
        for n in _PROCESSES[settings.size]
    ]


def measure(job: Job, channel: Channel) -> None:
    """Starts the processes and hands on what the first of them says."""
    workload, _, count = job.workload.removesuffix(" processes").rpartition(", ")
    told = {
        "workload": workload,
        "size": job.settings.size,
        "repeats": job.settings.repeats,
        "peers": job.peers,
        "directory": job.settings.directory,
    }
    for sample in samples_of("pods", told, int(count), job.devices):
        channel.sample(**sample)
        if sample["metric"] == "cpu":
            channel.tick()


def samples_of(
    module: str, told: dict[str, Any], count: int, devices: int
) -> Iterator[dict[str, Any]]:
    """Runs a module of `benchmarks` as the processes of a job. Yields what the first one finds.

    Args:
        module: it takes a JSON of what it is told, with its `address`, `count` and `index`.
        told: what to tell each.
        count: of processes.
        devices: of each.

    Raises:
        RuntimeError: one of them failed.
    """
    told = {**told, "address": f"127.0.0.1:{_free_port()}", "count": count}
    variables = environment(devices) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    with tempfile.TemporaryFile("w+") as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", json.dumps(told | {"index": i})],
                stdout=None if i else subprocess.PIPE,
                stderr=errors,
                env=variables,
                text=True,
            )
            for i in range(count)
        ]
        try:
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                if line.startswith(TOLD):
                    yield json.loads(line.removeprefix(TOLD))
            failed = [status for process in processes if (status := process.wait())]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            errors.seek(0)
            raise RuntimeError(f"processes ended with {failed}:\n{errors.read()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _one_process(told: dict[str, Any]) -> None:
    jax.distributed.initialize(told["address"], told["count"], told["index"])
    mesh = workloads.mesh_of_all_devices()
    state = workloads.build(workloads.WORKLOADS[told["workload"]](told["size"]), mesh)
    update = workloads.donating_update(state, mesh)
    for repeat in range(told["repeats"]):
        for name in rotated(tuple(told["peers"]), repeat):
            directory = pathlib.Path(told["directory"]) / f"{name}_{repeat}"
            state = _save(name, directory, update, state)


def _save(name: str, directory: pathlib.Path, update: workloads.Step, state: Any) -> Any:
    """Saves once to warm up and once to measure. Nothing else runs."""
    peer, n_bytes = PEERS[name], workloads.state_bytes(state)
    if jax.process_index() == 0:
        os.sync()
    with manager(peer, directory, state_bytes=n_bytes) as opened:
        opened.save(0, args=save_args(peer, state))
        opened.wait_until_finished()
        state = jax.block_until_ready(update(state))
        multihost_utils.sync_global_devices("all are ready to save")
        cpu_before_s, start_s = meters.cpu_s(), time.perf_counter()
        opened.save(1, args=save_args(peer, state))
        save_s = time.perf_counter() - start_s
        opened.wait_until_finished()
        committed_s = time.perf_counter() - start_s
        mine = np.array([save_s, committed_s, meters.cpu_s() - cpu_before_s])
    times = multihost_utils.process_allgather(mine)
    # The slowest process holds up all of them; CPU seconds add up.
    found = {"save": times[:, 0].max(), "committed": times[:, 1].max(), "cpu": times[:, 2].sum()}
    if jax.process_index() == 0:
        for metric, value in found.items():
            sample = {"peer": name, "metric": metric, "value": float(value)}
            print(TOLD + json.dumps(sample), flush=True)
    return state


if __name__ == "__main__":
    _one_process(json.loads(sys.argv[1]))
