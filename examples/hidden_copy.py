"""Two ways to hide the copy of the state behind the step itself.

    python examples/hidden_copy.py

Four emulated devices, data in parallel and the weights split over them. The same training, three
times: with one donating step, with the step in two halves (`split_step`), and with a step that
returns a copy of its input (`SnapshotStep`). Each saves through a `CheckpointManager`; each
restores the same numbers, and all three lose alike. When to use which:
`examples/guides/modes.md`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

MESH = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
STEPS, SAVE_EVERY = 9, 3
OPTIMIZER = optax.adam(1e-2)


def on_mesh(tree, *spec):
    return jax.device_put(tree, NamedSharding(MESH, P(*spec)))


def predict(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def new_state():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "in": on_mesh(0.1 * jax.random.normal(keys[0], (16, 512)), None, "d"),
        "out": on_mesh(0.1 * jax.random.normal(keys[1], (512, 1)), "d"),
    }
    state = TrainState.create(apply_fn=None, params=params, tx=OPTIMIZER)
    # Counters too: what is committed to its devices is compiled for once.
    return jax.tree.map(lambda x: x if jnp.ndim(x) else on_mesh(jnp.asarray(x)), state)


def batch(i):
    x = np.random.default_rng(i).standard_normal((32, 16), dtype=np.float32)
    return on_mesh((x, x[:, :1] ** 2), "d")


def gradients(state, batch):
    x, y = batch
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(state.params)
    return grads, loss


def update(state, grads):
    return state.apply_gradients(grads=grads)


def train_step(state, batch):
    grads, loss = gradients(state, batch)
    return update(state, grads), loss


def manager_of(directory, mode, timelines):
    options = lazy_orbax.LazyOptions(mode=mode, on_timeline=timelines.append)
    return ocp.CheckpointManager(
        directory,
        item_handlers=lazy_orbax.standard_handler(options=options),
        options=ocp.CheckpointManagerOptions(save_interval_steps=SAVE_EVERY),
    )


def train_fused(directory, timelines):
    step = jax.jit(train_step, donate_argnums=0)
    return _save_before_each_step(step, manager_of(directory, "auto", timelines))


def train_split(directory, timelines):
    step = lazy_orbax.split_step(gradients, update)
    # The copies go straight to the host: the gradients of the next step hide them.
    return _save_before_each_step(step, manager_of(directory, "direct", timelines))


def _save_before_each_step(step, manager):
    state, losses = new_state(), []
    with manager:
        for i in range(STEPS):
            manager.save(i, args=ocp.args.StandardSave(state))
            state, loss = step(state, batch(i))
            losses.append(float(loss))
    return losses


def train_in_step(directory, timelines):
    state, losses = new_state(), []
    step = lazy_orbax.SnapshotStep(train_step)
    step.compile(state, batch(0))
    with manager_of(directory, "auto", timelines) as manager:
        for i in range(STEPS):
            if manager.should_save(i):
                (state, loss), snapshot = step.with_snapshot(state, batch(i))
                manager.save(i, args=ocp.args.StandardSave(snapshot))
                del snapshot  # Its memory is free again when it has been written.
            else:
                state, loss = step(state, batch(i))
            losses.append(float(loss))
    return losses


def main(directory: pathlib.Path) -> None:
    restored = {}
    runs = {"fused": train_fused, "split": train_split, "in_step": train_in_step}
    all_losses = {}
    for name, train in runs.items():
        timelines: list[lazy_orbax.SaveTimeline] = []
        all_losses[name] = train(directory / name, timelines)
        # Stock Orbax reads them all.
        with ocp.CheckpointManager(directory / name) as stock:
            steps = stock.all_steps()
            target = ocp.args.StandardRestore(jax.tree.map(np.zeros_like, new_state()))
            restored[name] = stock.restore(steps[-1], args=target)
        modes = {mode for timeline in timelines for mode in timeline.mode.split("+")}
        print(f"{name}: steps {steps} saved, mode {modes}: {timelines[-1].reason}")
        assert steps == [0, 3, 6]
        # As long as a thread compiles what stages, `save()` copies.
        assert modes - {"copy"} <= {{"fused": "stage", "split": "direct"}.get(name, name)}
    losses = all_losses["fused"]
    for name in ("split", "in_step"):
        np.testing.assert_allclose(all_losses[name], losses, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            restored[name],
            restored["fused"],
        )
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; every way restores the same state")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Split and in-step, beside a fused step.")
    parser.add_argument("--directory", type=pathlib.Path, help="where to write; default: temporary")
    chosen = parser.parse_args().directory
    with tempfile.TemporaryDirectory() as temporary:
        main((chosen or pathlib.Path(temporary)).absolute())
