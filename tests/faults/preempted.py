"""A training process that saves slowly, until it is told to end."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import orbax.checkpoint as ocp
from equipment.training import SLAB_BYTES, Steps, make_state

import lazy_orbax


def main(directory: pathlib.Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    # The state of 6 MB takes six seconds, in slabs of a second's worth.
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES, write_bytes_per_s=SLAB_BYTES)
    state = make_state(mesh)
    steps = Steps(state)
    handler = lazy_orbax.standard_handler(options=options)
    with (
        lazy_orbax.Preemption(grace_s=60) as preemption,
        ocp.CheckpointManager(directory, item_handlers=handler) as manager,
    ):
        manager.save(0, args=ocp.args.StandardSave(state))
        print("SAVING", flush=True)
        for step in range(1, 10**9):
            state = steps.donating(state)
            if preemption.reached(manager, step):
                break
        outcome = preemption.last_save(manager, step, args=ocp.args.StandardSave(state))
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
