"""Arrays of parts in host memory: of those that are alike, JAX checks the first."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_LOG = logging.getLogger("lazy_orbax")
_NEEDED = ("interpreters.pxla", "batched_device_put")


@functools.cache
def _probed() -> Any:
    """Returns what makes an array in JAX 0.10 and 0.12; `None` if it is there no more."""
    module, symbol = _NEEDED
    try:
        return getattr(importlib.import_module(f"jax._src.{module}"), symbol)
    except (ImportError, AttributeError) as error:
        _LOG.warning("Restores take longer with JAX %s: %s.", jax.__version__, error)
        return None


class ArrayMaker:
    """Makes arrays: the first of each kind by JAX's public function, which checks what it is given.

    The others are made without these checks, in a fifth of the time.
    """

    def __init__(self) -> None:
        self._kinds: dict[Any, tuple[Any, list[Any]]] = {}

    def array_of(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        sharding: jax.sharding.Sharding,
        parts: Sequence[np.ndarray],
    ) -> jax.Array:
        """Returns an array. On CPU devices it takes the memory of its parts, where that is aligned.

        Args:
            shape: of the array.
            dtype: of the array, and of each part.
            sharding: of the array.
            parts: the shard of each addressable device, in the order of
                `sharding.addressable_devices_indices_map`; all have the shape of a shard.

        Raises:
            TypeError: JAX has no such dtype.
        """
        kind = shape, dtype, sharding
        if kind in self._kinds and (put := _probed()) is not None:
            abstract, devices = self._kinds[kind]
            return put(abstract, sharding, parts, devices)
        where = sharding.addressable_devices_indices_map(shape)
        by_start = dict(zip(map(_start, where.values()), parts, strict=True))
        made = jax.make_array_from_callback(
            shape, sharding, lambda index: by_start[_start(index)], dtype=dtype
        )
        self._kinds[kind] = made.aval, list(where)
        return made


def _start(index: tuple[slice, ...] | None) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index or ())
