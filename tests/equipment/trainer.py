"""A process of a job that trains and keeps snapshots, one step at a time, as the test says."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore  # noqa: F401 - Orbax imports it when it is first needed.
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.tiers.parity import node_link

VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
}
ROWS = 48


def host_state(step: int) -> dict[str, np.ndarray]:
    """Returns what the state of a step must be."""
    whole = np.arange(ROWS * 1024, dtype=np.uint32) * np.uint32(2654435761) ^ np.uint32(step)
    return {"rows": whole.reshape(ROWS, 1024), "whole": whole[:1000], "step": np.uint32(step)}


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Trainer:
    """What the test tells to do. Its state is a function of the step, and sharded over the job."""

    def join(self, address: str, n: int, process: int, run: str, host: str) -> list[int]:
        """Joins a job. Returns the processes of its group.

        Args:
            address: of the coordinator.
            n: how many processes.
            process: which one this is.
            run: the directory of the run.
            host: the address at which its node listens.
        """
        node_link._PROGRAM = "equipment.staged_node"
        self._said = _Said()
        logging.getLogger("lazy_orbax").addHandler(self._said)
        jax.distributed.initialize(address, n, process)
        mesh = Mesh(np.array(jax.devices()), ("all",))
        specs = {"rows": P("all"), "whole": P(), "step": P()}
        self._shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        self._manager = ocp.CheckpointManager(run)
        self._sum = jax.jit(lambda state: jnp.sum(state["rows"], dtype=jnp.uint32))
        parity = lazy_orbax.Parity(group=n, host=host, timeout_s=60.0)
        self._keeper = lazy_orbax.Keeper(run, parity=parity)
        return list(self._keeper.protection.group)

    def _state(self, step: int) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_callback(
                value.shape, self._shardings[name], lambda index, value=value: value[index]
            )
            for name, value in host_state(step).items()
        }

    def train(self, step: int) -> None:
        """Takes a step, of which every process needs all others."""
        state = self._state(step)
        assert int(self._sum(state)) == host_state(step)["rows"].sum(dtype=np.uint32)

    def keep(self, step: int) -> bool:
        """Keeps the state of a step. Returns whether that began."""
        return self._keeper.save(step, self._state(step))

    def store(self, step: int) -> None:
        """Saves to storage, and waits for it."""
        self._manager.save(step, args=ocp.args.StandardSave(self._state(step)))
        self._manager.wait_until_finished()

    def protection(self) -> dict[str, Any]:
        """Returns what became of parity, when nothing is on its way."""
        self._keeper.wait()
        return dataclasses.asdict(self._keeper.protection)

    def of_others(self) -> list[str]:
        """Returns what this machine has of other processes."""
        mine = self._keeper.slots.files(["default"]) + self._keeper.slots.guard.files(["default"])
        return sorted(set(self._keeper.slots.shelf.files()) - set(mine))

    def said(self) -> str:
        """Returns what the log has."""
        return "\n".join(self._said.lines)

    def restore(self, is_reversed: bool = False) -> dict[str, Any]:
        """Restores the newest step, and compares all of it that is here, bit for bit.

        Args:
            is_reversed: whether the first process wants the last rows.
        """
        devices = np.array(jax.devices())
        mesh = Mesh(devices[::-1] if is_reversed else devices, ("all",))
        wanted = {
            name: jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=NamedSharding(mesh, self._shardings[name].spec)
            )
            for name, value in host_state(0).items()
        }
        args = ocp.args.StandardRestore(wanted)
        found = lazy_orbax.restore_newest(self._manager, self._keeper, args=args)
        for name, value in host_state(found.step).items():
            for shard in found.value[name].addressable_shards:
                assert np.array_equal(np.asarray(shard.data), value[shard.index]), name
        return {
            "step": found.step,
            "tier": found.tier,
            "why": "; ".join(one.why for one in found.skipped),
            "rebuilt": [(one.process, one.sources) for one in found.rebuilt],
        }
