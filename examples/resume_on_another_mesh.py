"""Saves lazily on a mesh of eight devices, and restores on a mesh of two by four.

    python examples/resume_on_another_mesh.py

A checkpoint knows nothing of the devices that wrote it: tell the restore which sharding you want
and each device reads just its part. The same checkpoint is then restored by stock Orbax, as a
machine that has never heard of lazy_orbax would do it.
"""

import argparse
import os
import pathlib
import tempfile
import warnings
from typing import Any

# Read when JAX starts: eight devices on a CPU.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

PyTree = Any

# name: shape, dtype, how the training run splits it, how the run that resumes splits it
ARRAYS = {
    "embedding": ((512, 64), jnp.bfloat16, P("x", None), P("rows", "columns")),
    "kernel": ((64, 256), jnp.float32, P(None, "x"), P("columns", "rows")),
    "heads": ((8, 16, 32), jnp.float32, P("x"), P(None, ("rows", "columns"))),
    "bias": ((256,), jnp.float32, P(), P("columns")),
    "scale": ((128,), jnp.float32, P("x"), P()),
    "step": ((), jnp.int32, P(), P()),
}


def make_state(mesh: Mesh) -> PyTree:
    """Returns arrays of random values on the mesh of the training run, and a PRNG key."""

    def make(index: int, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.Array:
        values = 100 * jax.random.normal(jax.random.key(index), shape)
        return jax.device_put(values.astype(dtype), NamedSharding(mesh, spec))

    entries = enumerate(ARRAYS.items())
    state = {name: make(i, shape, dtype, spec) for i, (name, (shape, dtype, spec, _)) in entries}
    return state | {"key": jax.device_put(jax.random.key(7), NamedSharding(mesh, P()))}


def wanted_state(mesh: Mesh) -> PyTree:
    """Describes the state that the second run wants: shapes, dtypes, and its own shardings."""
    wanted = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, dtype, _, spec) in ARRAYS.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(7))
    replicated = NamedSharding(mesh, P())
    return wanted | {"key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)}


def to_host(state: PyTree) -> dict[str, np.ndarray]:
    """Copies a state to the host; the typed key becomes the numbers it holds."""
    numbers = state | {"key": jax.random.key_data(state["key"])}
    return {name: np.array(value) for name, value in numbers.items()}


def save_and_donate(directory: pathlib.Path, state: PyTree) -> None:
    """Saves the state and at once runs a step that donates it."""
    train_step = jax.jit(
        lambda tree: tree | {"step": tree["step"] + 1, "kernel": tree["kernel"] * 0.5},
        donate_argnums=0,
    )
    handler = lazy_orbax.standard_handler()
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        train_step(state)
        assert state["kernel"].is_deleted(), "the step did not donate the state"


def restore(
    directory: pathlib.Path, handler: ocp.StandardCheckpointHandler, wanted: PyTree
) -> PyTree:
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        assert manager.latest_step() == 1
        return manager.restore(1, args=ocp.args.StandardRestore(wanted))


def check(restored: PyTree, wanted: PyTree, expected: dict[str, np.ndarray]) -> None:
    """Asserts that every array has the sharding that was asked for and the bits that were saved."""
    for name, array in restored.items():
        assert array.sharding.is_equivalent_to(wanted[name].sharding, array.ndim), name
        assert array.dtype == wanted[name].dtype, name
    values = to_host(restored)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.tobytes() == expected[name].tobytes(), f"{name} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves on one mesh, restores on another.")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/another_mesh"))
    home = parser.parse_args().directory.absolute()
    home.mkdir(parents=True, exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="checkpoints-", dir=home))

    devices = np.array((jax.devices() if jax.device_count() >= 8 else jax.devices("cpu"))[:8])
    assert devices.size == 8, f"wanted 8 devices, found {devices.size}; does XLA_FLAGS say so?"
    state = make_state(Mesh(devices, ("x",)))
    expected = to_host(state)
    save_and_donate(directory, state)
    print(f"saved on a mesh of {devices.size}, and donated: {directory}")

    wanted = wanted_state(Mesh(devices.reshape(2, 4), ("rows", "columns")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as Orbax's warning that no sharding was given
        check(restore(directory, lazy_orbax.standard_handler(), wanted), wanted, expected)
        print("restored on a mesh of 2x4: equal bit for bit, no warning")
        check(restore(directory, ocp.StandardCheckpointHandler(), wanted), wanted, expected)
        print("stock Orbax restored the same checkpoint: equal bit for bit, no warning")


if __name__ == "__main__":
    main()
