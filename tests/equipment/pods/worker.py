"""A scenario of several processes: the modes of a snapshot, and trees that are refused."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.errors import TreeError
from lazy_orbax.snapshot.host_budget import HOST_BUDGET


def values(seed: int) -> dict[str, np.ndarray]:
    """The state in whole, the same on every process."""
    rng = np.random.default_rng(seed)
    return {
        "sharded": rng.standard_normal((512, 768), dtype=np.float32),
        "rows": rng.integers(-128, 128, (64, 33), dtype=np.int8),
        "replicated": rng.standard_normal((256, 128), dtype=np.float32),
        "prime": rng.standard_normal((257, 127), dtype=np.float32),
        "step": np.array(seed, dtype=np.int32),
    }


SPECS = {
    "sharded": P("a", "b"),
    "rows": P(("a", "b")),
    "replicated": P(),
    "prime": P(),
    "step": P(),
}


def on_mesh(mesh: jax.sharding.Mesh, name: str, value: np.ndarray) -> jax.Array:
    sharding = NamedSharding(mesh, SPECS[name])
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def refused(manager: ocp.CheckpointManager, step: int, state: object) -> str:
    """Returns the message with which `save` refuses `state`."""
    try:
        manager.save(step, args=ocp.args.StandardSave(state))
    except TreeError as error:
        return str(error)
    return "not refused"


def save_what_the_step_copied(root: pathlib.Path, mesh: jax.sharding.Mesh, report: Any) -> None:
    lines: list[lazy_orbax.SaveTimeline] = []
    options = lazy_orbax.LazyOptions(slab_bytes=2**20, on_timeline=lines.append)
    state = {name: on_mesh(mesh, name, value) for name, value in values(1).items()}
    step = lazy_orbax.SnapshotStep(
        lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree)
    )
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(root, item_handlers=handler) as manager:
        state, snapshot = step.with_snapshot(state)
        manager.save(1, args=ocp.args.StandardSave(snapshot))
        state = step(state)
        state, snapshot = step.with_snapshot(state)
        manager.save(4, args=ocp.args.StandardSave(snapshot))
        manager.wait_until_finished()
        report["modes"]["in_step"] = manager.all_steps()
    report["bytes"]["in_step"] = [line.bytes_written for line in lines if line.error is None]
    report["in_step"] = sorted({line.mode for line in lines})


def main(root: pathlib.Path) -> dict[str, object]:
    # Both axes go over both processes for some device of each.
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    report: dict[str, object] = {"bytes": {}, "modes": {}}
    for mode in ("stage", "direct", "auto", "files"):
        lines: list[lazy_orbax.SaveTimeline] = []
        options = lazy_orbax.LazyOptions(
            mode="auto" if mode == "files" else mode, slab_bytes=2**20, on_timeline=lines.append
        )
        state = {name: on_mesh(mesh, name, value) for name, value in values(1).items()}
        donating = jax.jit(
            lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree),
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda x: x.sharding, state),
        )
        handler = lazy_orbax.standard_handler(options=options, use_ocdbt=mode != "files")
        with ocp.CheckpointManager(root / mode, item_handlers=handler) as manager:
            manager.save(1, args=ocp.args.StandardSave(state))
            state = donating(donating(state))
            manager.wait_until_finished()
            local = jnp.arange(4.0)
            elsewhere = (
                jax.device_put(
                    np.ones((2, 2), np.float32),
                    NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:2]), ("c",)), P("c")),
                )
                if mode == "stage"
                else None
            )
            if mode == "stage":
                report["local"] = refused(manager, 2, {"ok": state["step"], "bad": local})
                # On process 0 it is an array of that process alone; on process 1 it has no shard.
                report["elsewhere"] = refused(manager, 3, {"ok": state["step"], "bad": elsewhere})
            manager.save(4, args=ocp.args.StandardSave(state))
            state = donating(state)
            manager.wait_until_finished()
            report["modes"][mode] = manager.all_steps()
        report["bytes"][mode] = [line.bytes_written for line in lines if line.error is None]
    save_what_the_step_copied(root / "in_step", mesh, report)
    report["in_flight"] = HOST_BUDGET.in_flight_bytes
    return report
