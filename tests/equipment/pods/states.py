"""A training state over any mesh of axes a and b, whose value after any step NumPy knows too."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
from equipment.trees import random_array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

SPECS = {
    "both": P("a", "b"),
    "columns": P(None, ("a", "b")),
    "rows": P(("b", "a")),
    "half": P("b"),
    "replicated": P(),
    "prime": P(),
    "step": P(),
}
OTHER_SPECS = {
    "both": P("b", None),
    "columns": P("a", "b"),
    "rows": P(),
    "half": P(None, "a"),
    "replicated": P(("a", "b")),
    "prime": P(),
    "step": P(),
}


def values(n_steps: int) -> dict[str, np.ndarray]:
    """The state after so many steps of `training_step`."""
    rng = np.random.default_rng(7)
    state = {
        "both": random_array(rng, (1024, 384), np.float32),
        "columns": random_array(rng, (128, 512), ml_dtypes.bfloat16),
        "rows": random_array(rng, (64, 33), np.int8),
        "half": random_array(rng, (16, 24), np.float32),
        "replicated": random_array(rng, (128, 128), np.float32),
        "prime": random_array(rng, (31, 17), np.float32),
        "step": np.array(3, dtype=np.int32),
    }
    for _ in range(n_steps):
        for name, value in state.items():
            # At least one dimension, for NumPy warns of overflow in scalars alone.
            bits = value.reshape(-1).view(f"uint{8 * value.dtype.itemsize}")
            bits = bits * bits.dtype.type(3) + bits.dtype.type(1)
            state[name] = bits.view(value.dtype).reshape(value.shape)
    return state


N_BYTES = sum(value.nbytes for value in values(0).values())


def on_mesh(mesh: jax.sharding.Mesh, n_steps: int) -> dict[str, jax.Array]:
    """The state on a mesh that may span processes."""
    return {
        name: jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, SPECS[name]), lambda index, value=value: value[index]
        )
        for name, value in values(n_steps).items()
    }


def training_step(state: dict[str, jax.Array]) -> Any:
    """Returns the jitted step, which donates its argument."""

    def changed(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(bits * 3 + 1, leaf.dtype)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        lambda tree: jax.tree.map(changed, tree), donate_argnums=0, out_shardings=shardings
    )


def targets(mesh: jax.sharding.Mesh, specs: dict[str, P]) -> dict[str, jax.ShapeDtypeStruct]:
    """What to restore the state as."""
    return {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, specs[name])
        )
        for name, value in values(0).items()
    }


def differences(state: dict[str, jax.Array], wanted: dict[str, np.ndarray]) -> list[str]:
    """Returns the leaves of which a shard on this process has other bits than it should have."""
    found = [] if sorted(state) == sorted(wanted) else [f"leaves {sorted(state)}"]
    for name, leaf in state.items():
        for shard in leaf.addressable_shards:
            part = wanted[name][shard.index]
            if shard.data.dtype != part.dtype or np.array(shard.data).tobytes() != part.tobytes():
                found.append(f"{name} on {shard.device}")
    return found
