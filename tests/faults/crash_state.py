"""The small state that is saved when a process dies or the power is cut."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def make_state(step: int, mesh: jax.sharding.Mesh, *, frozen: bool = False) -> dict[str, Any]:
    """Returns a state of two slabs, of random bits that are others in every step.

    Args:
        step: the step.
        mesh: where it lies.
        frozen: whether most of it is the same in every step.
    """
    if frozen:
        first = make_state(0, mesh)
        return {**make_state(step, mesh), "split": first["split"], "large": first["large"]}
    rng = np.random.default_rng(step)

    def on_mesh(shape: tuple[int, ...], *spec: Any) -> jax.Array:
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        return jax.device_put(bits, NamedSharding(mesh, P(*spec)))

    return {
        "split": on_mesh((512, 384), mesh.axis_names[0]),
        "large": on_mesh((512, 256), mesh.axis_names[0]),
        "replicated": on_mesh((7, 5)),
        "host": rng.integers(0, 100, 5),
        "step": step,
    }
