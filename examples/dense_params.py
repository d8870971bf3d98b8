"""Saves parameters often, beside the whole state, and merges the last of them.

    python examples/dense_params.py

One `CheckpointManager` has two items. The whole state of the byte transformer is saved every
`FULL_EVERY` steps, and the last two of these are kept. Its parameters alone, in bfloat16, are saved
every `DENSE_EVERY` steps, and the last ten are kept. In the end the dense checkpoints are merged by
a schedule of WSM, out of core, and the merge is evaluated beside the last parameters.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers
from tqdm import tqdm

import lazy_orbax
from byte_transformer import BATCH, SEQUENCE, Batches, ByteTransformer, standard_library_text

DENSE_EVERY, FULL_EVERY = 2, 8
DENSE_KEPT, FULL_KEPT = 10, 2
HELD_OUT = 8  # batches

# A step is kept if one of these wants it. The steps of the whole state are among the dense ones.
policies = checkpoint_managers.preservation_policy
KEPT = policies.AnyPreservationPolicy(
    [
        policies.LatestN(DENSE_KEPT),
        policies.EveryNSteps(FULL_EVERY, max_to_keep=FULL_KEPT),
    ]
)


def loss_of(model: ByteTransformer, batch: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    tokens = batch.astype(jnp.int32)
    logits = model(tokens[:, :-1], rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(donate_argnums=0)
def train_step(optimizer: nnx.ModelAndOptimizer, batch: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(optimizer.model, batch, rngs)
    optimizer.update(grads)
    return loss


@nnx.jit
def held_out_loss(model: ByteTransformer, batches: jax.Array) -> jax.Array:
    model.eval()
    return jnp.stack([loss_of(model, batch, nnx.Rngs(0)) for batch in batches]).mean()


def with_params(params: dict) -> ByteTransformer:
    """Returns a model that has these parameters, in float32."""
    model = ByteTransformer(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(model, state)
    return model


def train(manager: ocp.CheckpointManager, steps: int) -> ByteTransformer:
    optimizer = nnx.ModelAndOptimizer(ByteTransformer(nnx.Rngs(0)), optax.adam(3e-3))
    batches, rngs = Batches(standard_library_text()), nnx.Rngs(1)
    for step in tqdm(range(1, steps + 1), "training"):
        train_step(optimizer, jnp.asarray(next(batches)), rngs)
        if step % DENSE_EVERY == 0:
            dense = lazy_orbax.params_of(optimizer, jnp.bfloat16)
            items = {"params": ocp.args.StandardSave(dense)}
            if step % FULL_EVERY == 0:
                items["state"] = ocp.args.StandardSave(nnx.to_pure_dict(nnx.state(optimizer)))
            manager.save(step, args=ocp.args.Composite(**items))
    return optimizer.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/dense"))
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    home = arguments.directory.absolute()
    home.mkdir(parents=True, exist_ok=True)
    run = pathlib.Path(tempfile.mkdtemp(prefix="checkpoints-", dir=home))

    handlers = {name: lazy_orbax.standard_handler() for name in ("params", "state")}
    options = ocp.CheckpointManagerOptions(preservation_policy=KEPT)
    with ocp.CheckpointManager(run / "run", item_handlers=handlers, options=options) as manager:
        model = train(manager, arguments.steps)
        manager.wait_until_finished()
        steps = list(manager.all_steps())
    full = [step for step in steps if (run / "run" / str(step) / "state").exists()]
    dense = steps[-DENSE_KEPT:]
    print(f"kept: parameters at {steps}, the whole state at {full}")
    assert dense == list(range(dense[0], arguments.steps + 1, DENSE_EVERY))
    assert set(full) >= set(range(FULL_EVERY, arguments.steps + 1, FULL_EVERY)[-FULL_KEPT:])

    sources = [run / "run" / str(step) / "params" for step in dense]
    print(lazy_orbax.merge(sources, "cosine", run / "merged", dtype=jnp.float32))
    merged = with_params(lazy_orbax.load(run / "merged" / "params"))

    text = standard_library_text()
    held_out = Batches(text, position=len(text) // BATCH // 2)
    batches = jnp.asarray(np.stack([next(held_out) for _ in range(HELD_OUT)]))
    assert batches.shape == (HELD_OUT, BATCH, SEQUENCE + 1)
    for name, one in (("last step", model), (f"merge of {len(dense)}", merged)):
        print(f"{name}: held-out loss {float(held_out_loss(one, batches)):.4f}")


if __name__ == "__main__":
    main()
