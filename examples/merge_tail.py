"""What merges of the last checkpoints are worth, beside a decayed learning rate.

    python examples/merge_tail.py --seeds 3

For each seed the byte transformer is trained at a constant learning rate. Over the last part, the
tail, its parameters are saved every few steps. From the start of the tail, a second run goes on
with a learning rate that decays to zero. The checkpoints of the tail are merged by schedules of WSM
(arXiv 2507.17634), and the coefficients are searched (LCSC, arXiv 2404.02241) on one held-out part
of the text. All are evaluated on another part, which nobody has seen.
"""

import argparse
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import lazy_orbax
from byte_transformer import Batches, ByteTransformer, standard_library_text

PEAK, WARMUP = 3e-3, 20
HELD_OUT, START = 16, 60_000  # batches, and where in each stream of the text they begin
SCHEDULES = ("uniform", "cosine", "1-sqrt")
ADAM = optax.scale_by_adam()


class Run:
    """A model that is trained, from one seed."""

    def __init__(self, seed: int):
        self.graphdef, params, self.rest = nnx.split(
            ByteTransformer(nnx.Rngs(seed)), nnx.Param, ...
        )
        self.params = nnx.to_pure_dict(params)
        self.like = params
        self.step_of = jax.jit(self._step)
        self.losses_of = jax.jit(self._loss)
        self.seed = seed

    def _loss(self, params: dict, batch: jax.Array, key: jax.Array | None = None) -> jax.Array:
        state = jax.tree.map(lambda leaf: leaf, self.like)
        nnx.replace_by_pure_dict(state, params)
        model = nnx.merge(self.graphdef, state, self.rest)
        if key is None:
            model.eval()
        tokens = batch.astype(jnp.int32)
        logits = model(tokens[:, :-1], nnx.Rngs(dropout=jax.random.key(0) if key is None else key))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def _step(self, params: dict, moments: optax.OptState, batch: jax.Array, rate: jax.Array):
        key = jax.random.fold_in(jax.random.key(self.seed), batch.astype(jnp.int32).sum())
        grads = jax.grad(self._loss)(params, batch, key)
        updates, moments = ADAM.update(grads, moments)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments

    def held_out(self, params: dict, part: int) -> float:
        """Returns the loss on a part of the text that is not trained on."""
        batches = Batches(standard_library_text(), START + part * HELD_OUT * 64)
        losses = [self.losses_of(params, next(batches)) for _ in range(HELD_OUT)]
        return float(jnp.stack(losses).mean())


def train(run: Run, steps: int, tail: int, every: int, directory: pathlib.Path) -> dict:
    """Trains both runs. Returns the parameters of the one whose learning rate decayed."""
    params, batches = run.params, Batches(standard_library_text())
    moments, forked = ADAM.init(params), None
    with ocp.CheckpointManager(directory, item_handlers=lazy_orbax.standard_handler()) as manager:
        for step in tqdm(range(1, steps + 1), "constant"):
            rate = PEAK * min(1, step / WARMUP)
            params, moments = run.step_of(params, moments, next(batches), jnp.float32(rate))
            if step == steps - tail:
                forked = (params, moments, batches.position)
            if step > steps - tail and step % every == 0:
                manager.save(step, args=ocp.args.StandardSave(params))
    assert forked is not None
    params, moments, position = forked
    batches = Batches(standard_library_text(), position)
    for i in tqdm(range(tail), "decayed"):
        rate = jnp.float32(PEAK * (1 - (i + 1) / tail))
        params, moments = run.step_of(params, moments, next(batches), rate)
    return params


def compare(run: Run, directory: pathlib.Path, decayed: dict, budget: int) -> dict[str, float]:
    """Returns the loss of each on the part that nobody has seen."""
    steps = sorted(int(path.name) for path in directory.iterdir())
    sources = [directory / str(step) for step in steps]
    like = jax.eval_shape(lambda: run.params)

    def merged(name: str, how: str | tuple[float, ...]) -> float:
        out = directory.parent / f"{directory.name}-{name.replace(':', '-')}"
        lazy_orbax.merge(sources, how, out)
        return run.held_out(lazy_orbax.load(out, like), 1)

    found = lazy_orbax.search(
        lambda params: run.held_out(params, 0),
        sources,
        budget,
        like=like,
        seed=run.seed,
        log=directory.parent / f"{directory.name}.jsonl",
    )
    print(found)
    rates = [f"ema:{rate}" for rate in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)]
    emas = {rate: merged(rate, rate) for rate in rates}
    losses = {
        "last checkpoint": run.held_out(lazy_orbax.load(sources[-1], like), 1),
        "decayed run": run.held_out(decayed, 1),
        **{f"merge, {name}": merged(name, name) for name in SCHEDULES},
        "merge, best ema there": min(emas.values()),
        "merge, searched": merged("searched", found.coefficients),
    }
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/tail"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--tail", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--budget", type=int, default=80)
    arguments = parser.parse_args()
    assert arguments.steps * 64 < START, "so many steps would train on what is held out"
    home = arguments.directory.absolute()
    home.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(tempfile.mkdtemp(prefix="runs-", dir=home))
    table: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        run, directory = Run(seed), root / str(seed)
        decayed = train(run, arguments.steps, arguments.tail, arguments.every, directory)
        for name, loss in compare(run, directory, decayed, arguments.budget).items():
            table.setdefault(name, []).append(loss)
    for name, losses in table.items():
        shown = "  ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name:24}{shown}  mean {statistics.fmean(losses):.4f}")
    assert all(np.isfinite(loss) for losses in table.values() for loss in losses)


if __name__ == "__main__":
    main()
