"""Trees to save, and comparison bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Of the dtypes that have less than a byte.
_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array whose bits are random, NaNs with payloads included."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.name in _BITS:  # In the low bits of a byte each.
        return rng.integers(0, 2 ** _BITS[dtype.name], shape, dtype=np.uint8).view(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]


def on_mesh(
    array: np.ndarray, mesh: jax.sharding.Mesh, *spec: Any, memory_kind: str | None = None
) -> jax.Array:
    """Puts `array` on `mesh` with that partition spec."""
    return jax.device_put(array, NamedSharding(mesh, P(*spec), memory_kind=memory_kind))


def bits(leaf: Any) -> Any:
    """Returns what must be equal for two leaves to be the same bit for bit."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf)), bits(jax.random.key_data(leaf))
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        # A copy: a view of a caller's array would change what donation does to it.
        host = np.array(leaf)
        return str(host.dtype), host.shape, host.tobytes()
    return leaf


def all_bits(tree: Any) -> list[tuple[str, Any]]:
    """Returns the bits of every leaf with its key path."""
    return [
        (jax.tree_util.keystr(path), bits(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def assert_same(found: Any, wanted: Any) -> None:
    """Asserts that two trees are equal bit for bit."""
    found, wanted = all_bits(found), all_bits(wanted)
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        assert a == b, path


def abstract(tree: Any) -> Any:
    """Returns `tree` with arrays replaced by what to restore them as."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        tree,
    )
