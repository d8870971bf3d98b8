"""A training process that kills itself at a named place of its second save."""

from __future__ import annotations

import os
import pathlib
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import orbax.checkpoint as ocp
from equipment.gates import _before
from equipment.training import SLAB_BYTES, Steps, make_state

import lazy_orbax


def main(directory: pathlib.Path, place: str, call: int, mode: str) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    options = lazy_orbax.LazyOptions(mode=mode, slab_bytes=SLAB_BYTES)
    handler = lazy_orbax.standard_handler(options=options)
    state = make_state(mesh)
    manager = ocp.CheckpointManager(directory, item_handlers=handler)
    manager.save(1, args=ocp.args.StandardSave(state))
    state = Steps(state).donating(state)
    manager.wait_until_finished()
    with _before(place, call, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        manager.save(2, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
