"""Programs that use Orbax in their own way, unmodified: each saves, restores, and knows its values.

A client takes a directory and returns pairs of what it saved and what it restored.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.experimental import v1

# Asked when Keras is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")
STEPS = (0, 1, 2)


def installed(package):
    return pytest.importorskip(package, reason=f"{package} is not installed (extra `clients`)")


def _next(state):
    return jax.tree.map(lambda x: x * 2 + 1, state)


train_step = jax.jit(_next, donate_argnums=0)


def make_state():
    return {"params": {"w": jnp.arange(64.0).reshape(8, 8)}, "opt": {"mu": jnp.ones(8)}}


def host(tree):
    return jax.tree.map(np.asarray, tree)


def abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def flax_nnx_guide(path):
    """`StandardCheckpointer().save(path, state)`, restored into an abstract state."""
    nnx = installed("flax.nnx")
    _, state = nnx.split(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        graphdef, target = nnx.split(nnx.eval_shape(lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0))))
        restored = checkpointer.restore(path / "state", target)
    merged = nnx.merge(graphdef, restored)
    yield state["kernel"][...], merged.kernel[...]


def flax_linen_guide(path):
    """A train state, through a manager without handlers, with what is no array beside it."""
    linen, optax = installed("flax.linen"), installed("optax")
    train_state = installed("flax.training.train_state")
    model = linen.Dense(8)
    variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-3)
    )
    tree = {"model": state, "config": {"width": 8}}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(path, options=options) as manager:
        for step in STEPS:
            manager.save(step, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        restored = manager.restore(2, args=ocp.args.StandardRestore(abstract(tree)))
    yield state.params, restored["model"].params
    yield tree["config"], restored["config"]


def maxtext_v0(path):
    """Items and an iterator, `PyTreeSave` with a file size, a wait for the state, donation."""
    item_handlers = {
        "items": ocp.PyTreeCheckpointHandler(
            restore_concurrent_gb=96, save_concurrent_gb=96, use_ocdbt=True, use_zarr3=True
        ),
        "iter": ocp.JsonCheckpointHandler(),
    }
    state, saved = make_state(), []
    with ocp.CheckpointManager(
        path, item_names=("items", "iter"), item_handlers=item_handlers
    ) as manager:
        for step in STEPS:
            jax.block_until_ready(state)
            saved.append(host(state))
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(), state)
            items = ocp.args.PyTreeSave(
                item=state, save_args=save_args, ocdbt_target_data_file_size=2 * 1024**3
            )
            args = ocp.args.Composite(items=items, iter=ocp.args.JsonSave({"step": step}))
            manager.save(step, args=args)
            state = train_step(state)
        manager.wait_until_finished()
        target = abstract(state)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        for step in STEPS:
            items = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
            args = ocp.args.Composite(items=items, iter=ocp.args.JsonRestore())
            restored = manager.restore(step, args=args)
            yield saved[step], restored["items"]
            yield {"step": step}, restored["iter"]


def maxtext_v1(path):
    """`training.Checkpointer` with two checkpointables, saved while others are written."""
    state, saved = make_state(), []
    every = v1.training.save_decision_policies.FixedIntervalPolicy(1)
    with v1.training.Checkpointer(path, save_decision_policy=every) as checkpointer:
        for step in STEPS:
            saved.append(host(state))
            checkpointer.save_checkpointables_async(step, {"items": state, "meta": {"step": step}})
            state = train_step(state)
    with v1.training.Checkpointer(path) as checkpointer:
        for step in STEPS:
            restored = checkpointer.load_checkpointables(step, {"items": abstract(state)})
            yield saved[step], restored["items"]


def grain_iterator(path):
    """A data iterator of Grain beside the state."""
    grain = installed("grain")
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    seen = [next(iterator) for _ in range(7)]
    state, target = make_state(), abstract(make_state())
    with ocp.CheckpointManager(path) as manager:
        args = {
            "state": ocp.args.StandardSave(state),
            "data": grain.checkpoint.CheckpointSave(iterator),
        }
        manager.save(0, args=ocp.args.Composite(**args))
        manager.wait_until_finished()
        after = [next(iterator) for _ in range(3)]
        args = {
            "state": ocp.args.StandardRestore(target),
            "data": grain.checkpoint.CheckpointRestore(iterator),
        }
        restored = manager.restore(0, args=ocp.args.Composite(**args))
    yield host(state), restored["state"]
    yield np.array(after), np.array([next(restored["data"]) for _ in range(3)])
    yield seen, list(range(7))


def keras_callback(path):
    """Keras's `OrbaxCheckpoint`, on JAX."""
    keras = installed("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend: set KERAS_BACKEND=jax")
    keras.utils.clear_session()  # Its names of layers count on.
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
    model.compile(optimizer="adam", loss="mse")
    x, y = np.ones((16, 4), np.float32), np.ones((16, 8), np.float32)
    callback = keras.callbacks.OrbaxCheckpoint(directory=str(path), save_freq="epoch")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    weights = jax.tree.map(np.array, model.get_state_tree()["trainable_variables"])
    model.fit(x, y, epochs=1, verbose=0)
    steps = sorted(int(step.name) for step in path.iterdir() if step.name.isdigit())
    with v1.training.Checkpointer(path) as checkpointer:
        restored = checkpointer.load_checkpointables(steps[-1])["pytree"]
    yield weights, restored["trainable_variables"]


def tunix_manager(path):
    """Tunix's manager of checkpoints: a model and its optimizer."""
    nnx, optax = installed("flax.nnx"), installed("optax")
    # Tunix itself imports much that has nothing to do with checkpoints.
    package = importlib.util.find_spec("tunix")
    if package is None:
        pytest.skip("tunix is not installed (`pip install --no-deps google-tunix`)")
    file = pathlib.Path(package.submodule_search_locations[0]) / "sft" / "checkpoint_manager.py"
    spec = importlib.util.spec_from_file_location("tunix_checkpoint_manager", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(seed):
        model = nnx.Linear(4, 8, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    model, optimizer = make(0)
    manager = module.CheckpointManager(str(path))
    assert manager.save(1, model, optimizer, force=True)
    manager._checkpoint_manager.wait_until_finished()
    other, other_optimizer = make(1)
    assert manager.maybe_restore(other, other_optimizer)[0] == 1
    manager.close()
    yield np.asarray(model.kernel[...]), np.asarray(other.kernel[...])


CLIENTS = [
    flax_nnx_guide,
    flax_linen_guide,
    maxtext_v0,
    maxtext_v1,
    grain_iterator,
    keras_callback,
    tunix_manager,
]
