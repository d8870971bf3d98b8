"""What parity adds to a training loop: an exchange every ten steps, beside none.

Four processes on this machine each play a machine: a keeper, a memory and a node of its own. Blocks
of ten steps with a save and without one take turns, so that each save is compared with what came
before it. A step of theirs is a small update, a sum over all processes, and a wait, in which the
CPU is free: there an accelerator would compute.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import sys
import time
import uuid
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import lazy_orbax
from benchmarks import meters, workloads
from benchmarks.jobs import Channel, Job, Settings
from benchmarks.peers import rotated
from benchmarks.pods import TOLD, samples_of

_PEERS = ("keeper", "keeper_with_parity")
# Processes, leaves of 1 MiB in each, and pairs of blocks.
_SIZES = {"full": (4, 64, 6), "small": (4, 16, 4), "tiny": (2, 2, 2)}
_STEPS, _IDLE_S, _WARM_UP = 10, 0.1, 3
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def jobs(settings: Settings) -> list[Job]:
    n, leaves, _ = _SIZES[settings.size]
    job = Job(
        part="exchanges",
        settings=settings,
        devices=1,
        workload=f"{n} processes, {leaves} MiB each",
        peers=_PEERS,
        ticks=settings.repeats * len(_PEERS),
    )
    return [job]


def measure(job: Job, channel: Channel) -> None:
    """Starts the processes, in turns with parity and without."""
    n = _SIZES[job.settings.size][0]
    told = {"size": job.settings.size, "directory": job.settings.directory}
    for repeat in range(job.settings.repeats):
        for peer in rotated(job.peers, repeat):
            for sample in samples_of("exchanges", told | {"peer": peer}, n, job.devices):
                channel.sample(**sample)
            channel.tick()


class _Loop:
    """The training loop of one process."""

    def __init__(self, keeper: lazy_orbax.Keeper, n_leaves: int):
        mesh = workloads.mesh_of_all_devices()
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
        shape = (256 * jax.process_count(), 1024)
        self._keeper, self._number, self.in_save_s = keeper, 0, 0.0
        self._state = {
            f"leaf_{i:03}": jax.make_array_from_callback(
                shape, sharding, lambda index: np.full(shape, 1.0, np.float32)[index]
            )
            for i in range(n_leaves)
        }
        self._step = jax.jit(_update, donate_argnums=0)

    def block(self, *, with_save: bool) -> np.ndarray:
        """Runs ten steps, after a save or not, and waits for what is under way.

        Returns:
            Seconds of the loop, in `save`, and of what was left to do then; CPU seconds of this
            process, and of its node.
        """
        multihost_utils.sync_global_devices("a block")
        used_s, node_s, start_s = meters.cpu_s(), _node_cpu_s(), time.perf_counter()
        in_save_s = 0.0
        if with_save:
            self._number += 1
            assert self._keeper.save(self._number, self._state)
            in_save_s = time.perf_counter() - start_s
        for _ in range(_STEPS):
            self._state, loss = self._step(self._state)
            loss.block_until_ready()
            time.sleep(_IDLE_S)
        loop_s = time.perf_counter() - start_s
        self._keeper.wait()
        tail_s = time.perf_counter() - start_s - loop_s
        multihost_utils.sync_global_devices("its end")
        used_s, node_s = meters.cpu_s() - used_s, _node_cpu_s() - node_s
        return np.array([loop_s, in_save_s, tail_s, used_s, node_s])


def _update(state: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """Changes one leaf, so that the CPU is free for what is measured, and adds up all processes."""
    leaf = state["leaf_000"] * 0.5 + 1
    return state | {"leaf_000": leaf}, leaf.sum()


def _node_cpu_s() -> float:
    """CPU seconds of the node of this process, which is a child of it; 0 where there is none."""
    total = 0.0
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            program = (place / "cmdline").read_bytes()
        except OSError:  # It has ended.
            continue
        if int(fields[1]) == os.getpid() and b"parity.node_process" in program:
            total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total


def _one_process(told: dict[str, Any]) -> None:
    jax.distributed.initialize(told["address"], told["count"], told["index"])
    _, n_leaves, n_pairs = _SIZES[told["size"]]
    index, has_parity = told["index"], told["peer"] == "keeper_with_parity"
    parity = lazy_orbax.Parity(group=told["count"], domain=f"machine {index}")
    memory = f"/dev/shm/lazy_orbax-exchanges-{uuid.uuid4().hex[:8]}"
    run = pathlib.Path(told["directory"]) / "run"
    with lazy_orbax.Keeper(run, directory=memory, parity=parity if has_parity else None) as keeper:
        loop = _Loop(keeper, n_leaves)
        for _ in range(_WARM_UP):  # Compiles, and makes both generations.
            loop.block(with_save=True)
        blocks = [(loop.block(with_save=False), loop.block(with_save=True)) for _ in range(n_pairs)]
        saves = _WARM_UP + n_pairs
        assert keeper.report.kept == saves, keeper.report
        assert not has_parity or keeper.protection.protected == saves, keeper.protection
        exchanged = [keeper.protection.seconds, keeper.protection.received_bytes / saves]
        # By process, pair, whether there was a save, and what was measured.
        found = np.asarray(multihost_utils.process_allgather(np.array(blocks)))
        exchanges = np.asarray(multihost_utils.process_allgather(np.array(exchanged)))
    if index == 0:
        for sample in _samples(found, exchanges, has_parity=has_parity):
            print(TOLD + json.dumps({"peer": told["peer"], **sample}), flush=True)


def _samples(found: np.ndarray, exchanges: np.ndarray, *, has_parity: bool) -> list[dict[str, Any]]:
    # The slowest process holds up all of them; CPU seconds add up.
    without, with_save = found[:, :, 0], found[:, :, 1]
    added = with_save - without

    def median(values: np.ndarray) -> float:
        return float(statistics.median(values))

    samples = {
        "added_loop": median(added[:, :, 0].max(0)),
        "save": median(with_save[:, :, 1].max(0)),
        "ten_steps": median(without[:, :, 0].max(0)),
        "added_cpu": median(added[:, :, 3].sum(0)),
        "tail": median(with_save[:, :, 2].max(0)),
    }
    if has_parity:
        # Of all saves: the kernel counts in hundredths of a second.
        node_s, sent = float(with_save[:, :, 4].sum(0).mean()), float(exchanges[:, 1].sum())
        samples |= {"node_cpu": node_s, "node_cpu_for_gb": node_s / sent * 1e9}
        samples |= {"exchange": float(exchanges[:, 0].max())}
    told = [{"metric": metric, "value": value} for metric, value in samples.items()]
    if has_parity:
        told.append({"metric": "sent", "value": float(exchanges[:, 1].mean()), "unit": "bytes"})
    return told


if __name__ == "__main__":
    _one_process(json.loads(sys.argv[1]))
