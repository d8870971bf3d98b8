"""Runs of every kind to look at: stock v0 and v1, lazy, torn, corrupt, hostile."""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1

import lazy_orbax

STEPS = (1, 2, 12)
EVIL = "\x1b[31m[red]<script>alert(1)</script>\u202e\n"
"""A name that acts on a terminal, in rich's markup and on a page, if nobody escapes it."""


def state(step: int) -> dict[str, Any]:
    """Returns a state of which `fixed` is the same at each step, sharded over eight devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    kernel = jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, spread)
    fixed = jax.device_put(jnp.ones((4, 2), jnp.bfloat16), spread)
    return {"layer": {"bias": jnp.full(4, step), "kernel": kernel}, "fixed": fixed, "n": [step]}


def _save(
    run: pathlib.Path, handler: Any, make: Any = state, args: Any = ocp.args.StandardSave
) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(run, item_handlers=handler, options=options) as manager:
        for step in STEPS:
            manager.save(step, args=args(make(step)))


def make(root: pathlib.Path) -> None:
    """Makes one run of each kind, in directories of these names."""
    _save(root / "stock", ocp.StandardCheckpointHandler())
    _save(root / "lazy", lazy_orbax.standard_handler())
    _save(root / "evil", lazy_orbax.standard_handler(), lambda step: {EVIL: jnp.ones(2) * step})
    with v1.training.Checkpointer(root / "v1") as checkpointer:
        for step in STEPS:
            checkpointer.save(step, state(step))
    torn = shutil.copytree(root / "lazy", root / "torn")
    shutil.move(torn / "12", torn / "12.orbax-checkpoint-tmp")
    handler = lazy_orbax.pytree_handler(use_ocdbt=False)
    _save(root / "corrupt", handler, args=ocp.args.PyTreeSave)
    chunk = root / "corrupt" / "12" / "default" / "layer.kernel" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    hostile = shutil.copytree(root / "stock", root / "hostile")
    (hostile / "2" / "default" / "_METADATA").write_text('{"tree_metadata": {"w": ' + "[" * 10**5)
    os.mkfifo(hostile / "12" / "default" / "pipe")
