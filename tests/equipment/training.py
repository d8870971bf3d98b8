"""A training state worth donating: every way of sharding, and steps that donate it.

The state has leaves larger than a slab (of 1 MiB), and all that a step returns aliases what it was
given, so the pointers tell whether donation still works.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from equipment.trees import on_mesh, random_array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

SLAB_BYTES = 2**20
AXES = ("a", "b")


def make_state(mesh: jax.sharding.Mesh, seed: int = 0) -> dict[str, Any]:
    """Returns a state of about 6 MB over eight devices, of random bits."""
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), 8)
    return {
        "large": on_mesh(random_array(rng, (1024, 768), np.float32), mesh, "a", "b"),
        "columns": on_mesh(random_array(rng, (256, 1024), ml_dtypes.bfloat16), mesh, None, AXES),
        "rows": on_mesh(random_array(rng, (64, 33), np.int8), mesh, AXES),
        "half": on_mesh(random_array(rng, (8, 24), np.float32), mesh, "b"),
        "small": [on_mesh(random_array(rng, (16, n), np.float32), mesh, "a") for n in range(1, 9)],
        "replicated": {
            "small": on_mesh(random_array(rng, (33, 5), np.float32), mesh),
            "divides": on_mesh(random_array(rng, (256, 128), np.float32), mesh),
            "prime": on_mesh(random_array(rng, (257, 127), np.float32), mesh),
        },
        "step": on_mesh(np.array(seed, dtype=np.int32), mesh),
        "keys": jax.device_put(keys, NamedSharding(mesh, P(("a", "b")))),
    }


def _changed(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.vmap(jax.random.fold_in)(leaf, jnp.arange(leaf.size))
    as_bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(as_bits * 3 + 1, leaf.dtype)


@functools.cache  # To compile them takes longer than most tests that use them.
def _programs(structure: Any, shardings: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    tree_of_shardings = jax.tree.unflatten(structure, shardings)
    donating = jax.jit(
        lambda tree: jax.tree.map(_changed, tree),
        donate_argnums=0,
        out_shardings=tree_of_shardings,
    )
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=tree_of_shardings)
    busy = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), jnp.eye(64)))
    return donating, copy, busy


class Steps:
    """The programs of a training loop, compiled for one state."""

    def __init__(self, state: Any):
        leaves, structure = jax.tree.flatten(state)
        shardings = tuple(leaf.sharding for leaf in leaves)
        self.donating, self._copy, self._busy = _programs(structure, shardings)

    def bytes_of(self, state: Any) -> Any:
        """Returns `state` on the host, without any view of its arrays or a copy cached on them."""
        return jax.tree.map(_on_host, self._copy(state))

    def compute(self, n: int) -> None:
        """Keeps the device busy for `n` small matrix products, and waits for them."""
        self._busy(n).block_until_ready()


def _on_host(leaf: jax.Array) -> Any:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf  # Our own copy; what is compared is its data and its implementation.
    return np.array(leaf)


def pointers(state: Any) -> dict[str, list[int]]:
    """Returns where every shard of every leaf is in memory."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(path)] = [
            shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards
        ]
    return found


def cached_on_host(state: Any) -> list[str]:
    """Returns the leaves that carry a copy of themselves in host memory."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        parts = [leaf, *(shard.data for shard in leaf.addressable_shards), *leaf._arrays]
        if any(part._npy_value is not None for part in parts):
            found.append(jax.tree_util.keystr(path))
    return found
