"""Checkpoints a Flax Linen `TrainState` lazily, through `ocp.args.PyTreeSave`.

    python examples/linen_train_state.py

A small network learns to guess the next byte of the Python standard library's source from the
eight bytes before it. The state is donated to every step, saved halfway, and training goes on.
Then the checkpoint is restored into an abstract `TrainState` with shardings, compared with what
was saved, and trained to the same last step: both runs must end with the same bits.
"""

import argparse
import os
import pathlib
import sysconfig
import tempfile
from typing import Any

# Both are read when JAX starts: eight devices on a CPU, the same bits on every run on a GPU.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import lazy_orbax

CONTEXT, BATCH = 8, 256
STEPS, SAVE_AT = 40, 20

PyTree = Any


class NextByte(nn.Module):
    """A multilayer perceptron from `CONTEXT` bytes to the logits of the next one."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(256, 32)(tokens).reshape(len(tokens), -1)
        x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(256)(x)


# Made once: a TrainState holds both, and two states are only of one structure if they share them.
MODEL, OPTIMIZER = NextByte(), optax.adamw(1e-2)


def batch_of(text: np.ndarray, step: int) -> np.ndarray:
    """Returns the [BATCH, CONTEXT + 1] bytes of a step; they depend on nothing but the step."""
    starts = np.random.default_rng(step).integers(len(text) - CONTEXT, size=BATCH)
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


def new_state() -> TrainState:
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=OPTIMIZER)


def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    tokens = batch.astype(jnp.int32)

    def loss_of(params: PyTree) -> jax.Array:
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, -1]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def abstract_state(mesh: Mesh) -> TrainState:
    """Describes the state: matrices are split by columns, the rest is replicated."""

    def describe(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(None, "model") if leaf.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(describe, jax.eval_shape(new_state))


class Trainer:
    """Jitted functions over one mesh, and the text."""

    def __init__(self, mesh: Mesh):
        source = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
        self.text = np.frombuffer(source, np.uint8)
        self.abstract = abstract_state(mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.init = jax.jit(new_state, out_shardings=shardings)
        self.step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))

    def run(self, state: TrainState, first: int, last: int) -> tuple[TrainState, list[float]]:
        """Trains steps `first` to `last`; the state that is given is donated."""
        losses = []
        for step in tqdm(range(first, last + 1), f"steps {first}-{last}"):
            state, loss = self.step(state, batch_of(self.text, step))
            losses.append(float(loss))
        return state, losses


def open_manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory, item_handlers=lazy_orbax.pytree_handler())


def restore(manager: ocp.CheckpointManager, abstract: TrainState) -> TrainState:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
    restored = manager.restore(SAVE_AT, args=args)
    assert isinstance(restored, TrainState)
    return restored


def assert_same(found: TrainState, expected: TrainState) -> None:
    """Asserts equal structure and, leaf by leaf, equal bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected))
    for (path, a), b in leaves:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves a Flax Linen TrainState lazily.")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/linen"))
    home = parser.parse_args().directory.absolute()
    home.mkdir(parents=True, exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="checkpoints-", dir=home))
    trainer = Trainer(Mesh(np.array(jax.devices()), ("model",)))

    state, _ = trainer.run(trainer.init(), 1, SAVE_AT)
    saved = jax.tree.map(np.array, state)  # host copies, to compare with
    with open_manager(directory) as manager:
        manager.save(SAVE_AT, args=ocp.args.PyTreeSave(state))
        state, losses = trainer.run(state, SAVE_AT + 1, STEPS)  # its first step donates `state`
    print(f"saved step {SAVE_AT}, trained on to step {STEPS}: loss {losses[-1]:.3f}")

    with open_manager(directory) as manager:
        restored = restore(manager, trainer.abstract)
    assert_same(restored, saved)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract)
    found = jax.tree.map(lambda leaf: leaf.sharding, restored)
    assert found == wanted, "a leaf came back with another sharding"
    print(f"restored step {SAVE_AT}: equal bit for bit, sharded as asked")

    resumed, resumed_losses = trainer.run(restored, SAVE_AT + 1, STEPS)
    assert resumed_losses == losses, "the resumed run took another path"
    assert_same(resumed, state)
    print(f"trained the restored state to step {STEPS}: the same losses and the same state")


if __name__ == "__main__":
    main()
