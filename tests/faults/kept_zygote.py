"""Forks a trainer for each line of standard input: it restores, and keeps a snapshot every step.

Arguments: the run, and the keeper's directory. A trainer says `restored STEP TIER` and, for each
snapshot that is whole, `kept STEP`. A state is a function of its step, so it can tell wrong bytes.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore  # noqa: F401 - Orbax imports it when it is first needed.

import lazy_orbax

N = 2**20


def host_state(step: int) -> dict[str, np.ndarray]:
    """Returns what a state must be."""
    first = np.arange(N, dtype=np.uint32)
    return {"large": first * np.uint32(2654435761) ^ np.uint32(step), "step": np.uint32(step)}


def say(*words: object) -> None:
    """Tells the test."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def train(run: str, directory: str) -> None:
    """Trains until it is killed."""
    advance = jax.jit(
        lambda state: (
            {"large": state["large"] ^ state["step"] ^ (state["step"] + 1)}
            | {"step": state["step"] + 1}
        ),
        donate_argnums=0,
    )
    options = lazy_orbax.LazyOptions(mode="direct", slab_bytes=2**20)
    keeper = lazy_orbax.Keeper(run, directory=directory, options=options)
    state = jax.tree.map(jnp.asarray, host_state(0))
    with ocp.CheckpointManager(run) as manager:
        try:
            args = ocp.args.StandardRestore(state)
            newest = lazy_orbax.restore_newest(manager, keeper, args=args)
            state = newest.value
            for name, wanted in host_state(newest.step).items():
                assert np.array_equal(state[name], wanted), name
            say("restored", newest.step, newest.tier)
        except FileNotFoundError:
            say("restored", 0, "nothing")
        told = None
        while True:
            state = advance(state)
            keeper.save(int(state["step"]), state)
            if (newest_step := keeper.report.newest_step) != told:
                say("kept", told := newest_step)


def main(run: str, directory: str) -> None:
    """Forks, and says how that ended."""
    for _ in sys.stdin:
        if (pid := os.fork()) == 0:
            try:
                say("pid", os.getpid())
                train(run, directory)
            finally:
                sys.stderr.flush()
        say("died", os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
