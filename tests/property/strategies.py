"""Meshes, partition specs, shapes that they divide, and trees of all that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DTYPES = tuple(
    np.dtype(dtype)
    for dtype in (
        np.bool_,
        np.int8,
        np.uint16,
        np.int32,
        np.float16,
        np.float32,
        np.complex64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.int4,
    )
)


@st.composite
def mesh_shapes(draw: Any, n_devices: int) -> tuple[int, ...]:
    """Shapes of one to three axes, of at most `n_devices` devices, in any order."""
    shape: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        shape.append(draw(st.integers(1, n_devices // math.prod(shape))))
    return tuple(draw(st.permutations(shape)))


@st.composite
def meshes(draw: Any, devices: Sequence[Any]) -> Mesh:
    """Meshes over any of `devices`, in any order."""
    shape = draw(mesh_shapes(len(devices)))
    chosen = draw(st.permutations(devices))[: math.prod(shape)]
    return Mesh(np.array(chosen, dtype=object).reshape(shape), tuple("xyz")[: len(shape)])


@st.composite
def specs(draw: Any, mesh: Mesh, n_dims: int) -> P:
    """Partition specs of arrays with `n_dims` dimensions; no axis is used twice."""
    axes = draw(st.permutations(mesh.axis_names))
    cut = sorted(draw(st.integers(0, len(axes))) for _ in range(n_dims))
    parts = [tuple(axes[a:b]) for a, b in zip([0, *cut], cut, strict=False)]
    parts = draw(st.permutations(parts))
    return P(*[part or None if len(part) != 1 else part[0] for part in parts])


@st.composite
def divided(
    draw: Any, mesh: Mesh, *, most_per_shard: int = 6
) -> tuple[tuple[int, ...], NamedSharding]:
    """A shape, and a sharding over `mesh` that divides it."""
    n_dims = draw(st.integers(0, 3))
    spec = draw(specs(mesh, n_dims))
    shape = []
    for part in spec:
        axes = () if part is None else (part,) if isinstance(part, str) else part
        n_shards = math.prod(mesh.shape[axis] for axis in axes)
        shape.append(n_shards * draw(st.integers(1, most_per_shard)))
    return tuple(shape), NamedSharding(mesh, spec)


def sharding_of(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Some sharding over `mesh` that divides `shape`: the first dimension and axis that fit."""
    for i, size in enumerate(shape):
        for axis in mesh.axis_names:
            if size % mesh.shape[axis] == 0:
                return NamedSharding(mesh, P(*[None] * i, axis))
    return NamedSharding(mesh, P())


def devices() -> list[jax.Device]:
    return jax.devices()[:8]
