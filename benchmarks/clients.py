"""How long programs that use Orbax are held up by a save, with and without `install()`.

    python -m benchmarks.clients --repeats 5 --out FILE

Each client calls Orbax as it does by itself; `lazy_orbax.install()` is all that differs. A sample
is a process of its own: the least, median and most of so many are printed. What is not installed is
left out: the extra `clients`, and Tunix by `pip install --no-deps google-tunix`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.in_processes import parser_of, sample_of, tell

_LEAVES, _ELEMENTS, _SAVES = 200, 2**14, 6
# A client yields a save at a time, and waits for its end before the next.
Saves = Iterator[Callable[[], Any]]


def _state() -> Any:
    import jax

    return {f"{i}": jax.numpy.full(_ELEMENTS, i, jax.numpy.float32) for i in range(_LEAVES)}


def _step(state: Any) -> Any:
    import jax

    return jax.block_until_ready(jax.tree.map(lambda x: x * 0.5 + 1, state))


def _layers() -> Any:
    """Returns a model of Flax NNX with as many leaves."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            side = int(_ELEMENTS**0.5)
            rngs = nnx.Rngs(0)
            self.layers = nnx.List(
                [nnx.Linear(side, side, use_bias=False, rngs=rngs) for _ in range(_LEAVES)]
            )

    return Model()


def flax_nnx(path: pathlib.Path) -> Saves:
    """`StandardCheckpointer().save(path, state)`, as in Flax's guide."""
    import orbax.checkpoint as ocp
    from flax import nnx

    _, state = nnx.split(_layers())
    with ocp.StandardCheckpointer() as checkpointer:
        for n in range(_SAVES):
            yield lambda n=n: checkpointer.save(path / f"{n}", state)
            checkpointer.wait_until_finished()


def flax_linen(path: pathlib.Path) -> Saves:
    """A manager without handlers."""
    import orbax.checkpoint as ocp

    state = _state()
    with ocp.CheckpointManager(path) as manager:
        for n in range(_SAVES):
            args = ocp.args.StandardSave(state)
            yield lambda n=n, args=args: manager.save(n, args=args)
            manager.wait_until_finished()
            state = _step(state)


def maxtext_v0(path: pathlib.Path) -> Saves:
    """Items with handlers of their own, and `PyTreeSave` with arguments for each leaf."""
    import jax
    import orbax.checkpoint as ocp

    handlers = {
        "items": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
        "iter": ocp.JsonCheckpointHandler(),
    }
    state = _state()
    with ocp.CheckpointManager(
        path, item_names=("items", "iter"), item_handlers=handlers
    ) as manager:
        for n in range(_SAVES):
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(), state)
            items = ocp.args.PyTreeSave(state, save_args, ocdbt_target_data_file_size=2 * 1024**3)
            both = ocp.args.Composite(items=items, iter=ocp.args.JsonSave({"step": n}))
            yield lambda n=n, both=both: manager.save(n, args=both)
            manager.wait_until_finished()
            state = _step(state)


def maxtext_v1(path: pathlib.Path) -> Saves:
    """`training.Checkpointer` with two checkpointables."""
    from orbax.checkpoint import v1

    state = _state()
    every = v1.training.save_decision_policies.FixedIntervalPolicy(1)
    with v1.training.Checkpointer(path, save_decision_policy=every) as checkpointer:
        for n in range(_SAVES):
            both = {"items": state, "meta": {"step": n}}
            yield lambda n=n, both=both: checkpointer.save_checkpointables_async(n, both)
            checkpointer.wait()
            state = _step(state)


def grain(path: pathlib.Path) -> Saves:
    """An iterator of Grain beside the state."""
    import grain as of_google
    import orbax.checkpoint as ocp

    iterator, state = iter(of_google.MapDataset.range(100).to_iter_dataset()), _state()
    with ocp.CheckpointManager(path) as manager:
        for n in range(_SAVES):
            next(iterator)
            args = {
                "state": ocp.args.StandardSave(state),
                "data": of_google.checkpoint.CheckpointSave(iterator),
            }
            both = ocp.args.Composite(**args)
            yield lambda n=n, both=both: manager.save(n, args=both)
            manager.wait_until_finished()
            state = _step(state)


def keras(path: pathlib.Path) -> Saves:
    """The callback `OrbaxCheckpoint`, at the end of each epoch."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as of_keras
    import numpy as np

    side = int(_ELEMENTS**0.5)
    layers = [of_keras.layers.Dense(side, use_bias=False) for _ in range(_LEAVES // 3)]
    model = of_keras.Sequential([of_keras.Input((side,)), *layers])
    model.compile(optimizer="adam", loss="mse")
    x = np.ones((2, side), np.float32)
    callback = of_keras.callbacks.OrbaxCheckpoint(directory=str(path), save_freq="epoch")
    callback.set_model(model)
    model.fit(x, x, epochs=1, verbose=0)
    for n in range(_SAVES):
        yield lambda n=n: callback.on_epoch_end(n)
        callback.wait_until_finished()


def tunix(path: pathlib.Path) -> Saves:
    """Tunix's manager: a model and its optimizer."""
    import optax
    from flax import nnx

    package = importlib.util.find_spec("tunix")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'tunix'")
    # Tunix itself imports much that has nothing to do with checkpoints.
    file = pathlib.Path(package.submodule_search_locations[0]) / "sft" / "checkpoint_manager.py"
    spec = importlib.util.spec_from_file_location("tunix_checkpoint_manager", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = _layers()
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    manager = module.CheckpointManager(str(path))
    for n in range(_SAVES):
        yield lambda n=n: manager.save(n + 1, model, optimizer, force=True)
        manager._checkpoint_manager.wait_until_finished()
    manager.close()


CLIENTS = {
    "Flax NNX guide": flax_nnx,
    "Flax Linen guide": flax_linen,
    "MaxText, v0": maxtext_v0,
    "MaxText, v1": maxtext_v1,
    "Grain beside the state": grain,
    "Keras callback": keras,
    "Tunix": tunix,
}


def _sample(client: str, how: str, place: str) -> dict[str, float]:
    """Returns how long the first save, and a later one, held up a client, in seconds."""
    import lazy_orbax

    if how == "lazy":
        lazy_orbax.install()
    times = []
    for save in CLIENTS[client](pathlib.Path(place)):
        began_s = time.perf_counter()
        save()
        times.append(time.perf_counter() - began_s)
    is_lazy = any(pathlib.Path(place).rglob("lazy_orbax*"))
    assert is_lazy == (how == "lazy"), f"{client} saved the other way"
    return {"first save": times[0], "save": statistics.median(times[2:])}


def _in_a_process(client: str, how: str, directory: str | None) -> dict[str, float] | None:
    """Returns a sample; nothing where the client is not installed."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        try:
            return sample_of("clients", "--child", client, how, place)
        except RuntimeError as error:
            last = str(error).splitlines()[-1]
            if not last.startswith("ModuleNotFoundError"):
                raise
            print(f"{client} is left out: {last}", file=sys.stderr)
            return None


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=list(CLIENTS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_sample(*arguments.child)))
        return
    for client in arguments.clients:
        samples: dict[str, list[dict[str, float]]] = {"stock": [], "lazy": []}
        for _ in range(arguments.repeats):
            for how, found in samples.items():
                if (sample := _in_a_process(client, how, arguments.directory)) is not None:
                    found.append(sample)
        for how, found in samples.items():
            for measured in found[0] if found else ():
                values = [1e3 * sample[measured] for sample in found]
                record = {
                    "part": "clients",
                    "client": client,
                    "peer": how,
                    "measured": f"time inside the {measured}",
                    "median_ms": statistics.median(values),
                    "least_ms": min(values),
                    "most_ms": max(values),
                    "n": len(values),
                }
                tell(record, arguments)


if __name__ == "__main__":
    main()
