"""Arrays of parts that are in host memory. JAX's public functions take 5 to 30 times as long."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_LOG = logging.getLogger("lazy_orbax")
_NEEDED = (
    ("core", "ShapedArray"),
    ("core", "update_aval_with_sharding"),
    ("interpreters.pxla", "batched_device_put"),
)


@functools.cache
def _probed() -> tuple[Any, ...] | None:
    """Returns the symbols of JAX, read from 0.10 and 0.12; `None` if one is missing."""
    try:
        return tuple(
            getattr(importlib.import_module(f"jax._src.{module}"), symbol)
            for module, symbol in _NEEDED
        )
    except (ImportError, AttributeError) as error:
        _LOG.warning("Restores take longer with JAX %s: %s.", jax.__version__, error)
        return None


def array_of(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    parts: Sequence[np.ndarray],
) -> jax.Array:
    """Returns an array. On CPU devices it takes the memory of its parts, where that is aligned.

    Args:
        shape: of the array.
        dtype: of the array and its parts.
        sharding: of the array.
        parts: the shard of each addressable device, in the order of
            `sharding.addressable_devices_indices_map`.
    """
    devices = _devices_of(sharding, shape)
    if (symbols := _probed()) is None:
        shards = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)
    abstract, with_sharding, put = symbols
    return put(_kind(abstract, with_sharding, shape, dtype, sharding), sharding, parts, devices)


@functools.lru_cache(maxsize=4096)
def _devices_of(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[Any]:
    return list(sharding.addressable_devices_indices_map(shape))


@functools.lru_cache(maxsize=4096)
def _kind(abstract: Any, with_sharding: Any, shape: Any, dtype: Any, sharding: Any) -> Any:
    return with_sharding(abstract(shape, dtype), sharding)
