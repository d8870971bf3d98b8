"""A training process that kills itself at a named place of its second save with Orbax v1."""

from __future__ import annotations

import os
import pathlib
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from equipment.gates import _before
from equipment.training import SLAB_BYTES, Steps, make_state
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax.handlers.v1 import lazy_v1


def main(directory: pathlib.Path, place: str, call: int, way: str) -> None:
    """Saves step 1 and dies in step 2; without a place, ends while step 2 is being saved."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    lazy_v1(lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES))
    state = make_state(mesh)
    run = v1.training.Checkpointer(directory) if way == "Checkpointer" else None
    save = run.save_async if run else lambda n, tree: v1.save_async(directory / f"{n}", tree)
    save(1, state).result()
    state = Steps(state).donating(state)
    with _before(place or None, call, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        response = save(2, state)
        if place:
            response.result()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
