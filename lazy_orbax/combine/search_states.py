"""States that are linear combinations of checkpoints, made on the devices for each candidate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lazy_orbax._machine import free_device_bytes, memory_bytes
from lazy_orbax.combine.merge_sources import MergedLeaf

# Of the memory that is free: the caller's evaluation needs some.
_SHARE = 0.5

Combine = Callable[[Sequence[float]], Any]


def combiner(load: Callable[[int], Any], n: int, *, keeps: bool) -> Combine:
    """Returns what makes a state of coefficients.

    It is the first checkpoint and a sum of differences from it, in float32 or wider. What is no
    float comes from the last checkpoint.

    Args:
        load: returns the tree of a checkpoint, by its position.
        n: how many there are.
        keeps: whether the differences are kept on the devices. Else all checkpoints are read for
            each candidate, one after the other.
    """
    last = load(n - 1)
    if not keeps:
        return functools.partial(_streamed, load, last, n)
    base = _floats(load(0))
    others = [load(i) if i < n - 1 else last for i in range(1, n)]
    differences = [_minus(_floats(other), base) for other in others]

    def combine(coefficients: Sequence[float]) -> Any:
        by = jnp.asarray(list(coefficients[1:]), jnp.float32)
        return _with_floats(last, _sum(base, differences, by))

    return combine


def keeps_differences(leaves: Sequence[MergedLeaf], n: int) -> bool:
    """Whether the differences of all checkpoints fit into the memory of the devices.

    Args:
        leaves: of each checkpoint.
        n: how many there are.
    """
    averaged = [leaf for leaf in leaves if leaf.total is not None]
    n_bytes = 4 * sum(math.prod(leaf.shape) for leaf in averaged) * (n + 2)
    free = [free_device_bytes(device) for device in jax.local_devices()]
    host = memory_bytes() if math.inf in free else 0  # Of CPU devices nobody knows more.
    return n_bytes <= _SHARE * (host or sum(free))


def _streamed(load: Callable[[int], Any], last: Any, n: int, coefficients: Sequence[float]) -> Any:
    total = _scaled(_floats(last), jnp.float32(coefficients[n - 1]))
    for i in range(n - 1):
        total = _plus(total, _floats(load(i)), jnp.float32(coefficients[i]))
    return _with_floats(last, total)


def _floats(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if _is_float(leaf)]


def _is_float(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)


def _with_floats(tree: Any, floats: list[jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    values = iter(floats)

    def value(leaf: Any) -> Any:
        if not _is_float(leaf):
            return leaf
        found = next(values)
        return float(found) if isinstance(leaf, float) else found.astype(leaf.dtype)

    return structure.unflatten([value(leaf) for leaf in leaves])


def _wide(array: jax.Array) -> jax.Array:
    # JAX promotes no float8.
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)


@jax.jit
def _minus(arrays: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
    # What is infinite in both, as in a mask, does not differ.
    return [jnp.where(a == b, 0, _wide(a) - _wide(b)) for a, b in zip(arrays, others, strict=True)]


@jax.jit
def _sum(
    base: list[jax.Array], differences: list[list[jax.Array]], by: jax.Array
) -> list[jax.Array]:
    # Not a product of matrices: devices may round what goes into one.
    return [
        _wide(first) + sum(by[i] * one for i, one in enumerate(parts))
        for first, *parts in zip(base, *differences, strict=True)
    ]


@jax.jit
def _scaled(arrays: list[jax.Array], by: jax.Array) -> list[jax.Array]:
    wide = map(_wide, arrays)
    return [jnp.where(jnp.isfinite(array), by * array, array) for array in wide]


@functools.partial(jax.jit, donate_argnums=0)
def _plus(total: list[jax.Array], arrays: list[jax.Array], by: jax.Array) -> list[jax.Array]:
    wide = map(_wide, arrays)
    return [
        jnp.where(jnp.isfinite(array), t + by * array, array)
        for t, array in zip(total, wide, strict=True)
    ]
