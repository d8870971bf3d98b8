"""`params_of`: the parameters of a training state alone, to be saved often and cheaply."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazy_orbax._jax_context import neutral
from lazy_orbax.errors import OptionError

_GIVE = (
    "Give a Flax TrainState, an NNX module, optimizer or state, or a dictionary with `params`; or "
    "save the parameters themselves"
)


def params_of(state: Any, dtype: Any = None) -> Any:
    """Returns the parameters of a training state, without its optimizer's moments and counters.

    They are an item for a manager to save at steps at which the whole state is not: a third of
    the bytes with Adam, a sixth in bfloat16.

    Args:
        state: a Flax `TrainState` or another object with `params`; a dictionary with `params`; an
            NNX module, optimizer or state, of which every `nnx.Param` is taken, as nested
            dictionaries.
        dtype: of floats in the result, such as `jnp.bfloat16`. The cast is enqueued on the devices
            that have the arrays, and keeps their sharding. `None` returns the arrays themselves:
            save them before a step donates them, as always.

    Raises:
        OptionError: there are no parameters in it, or `dtype` is none of floats.
    """
    found = _nnx_params(state)
    if found is None:
        found = state.get("params") if isinstance(state, Mapping) else _attribute(state)
    if found is None or not jax.tree.leaves(found):
        raise OptionError(f"Found no parameters in a {type(state).__name__}. {_GIVE}.")
    return found if dtype is None else _cast(found, dtype)


def _attribute(state: Any) -> Any:
    found = getattr(state, "params", None)
    return None if callable(found) else found


def _nnx_params(state: Any) -> Any:
    """Returns the parameters of what is NNX's; `None` if it is not, for then nobody imported it."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return None
    if isinstance(state, nnx.State):
        return nnx.to_pure_dict(nnx.filter_state(state, nnx.Param))
    if isinstance(state, nnx.Module | nnx.Optimizer):
        return nnx.to_pure_dict(nnx.state(getattr(state, "model", state), nnx.Param))
    return None


def _cast(tree: Any, dtype: Any) -> Any:
    try:
        wanted = jnp.dtype(dtype)
    except TypeError as error:
        raise OptionError(f"dtype={dtype!r} is no dtype.") from error
    if not jnp.issubdtype(wanted, jnp.floating):
        raise OptionError(f"dtype={wanted.name} is none of floats.")
    leaves, structure = jax.tree.flatten(tree)
    todo = [i for i, leaf in enumerate(leaves) if _differs(leaf, wanted)]
    on_devices = [i for i in todo if isinstance(leaves[i], jax.Array)]
    with neutral():
        made = _caster(wanted)([leaves[i] for i in on_devices])
    for i, leaf in zip(on_devices, made, strict=True):
        leaves[i] = leaf
    for i in todo:
        if isinstance(leaves[i], np.ndarray | np.generic):
            leaves[i] = leaves[i].astype(wanted)
    return structure.unflatten(leaves)


def _differs(leaf: Any, wanted: np.dtype) -> bool:
    found = getattr(leaf, "dtype", None)
    return found is not None and jnp.issubdtype(found, jnp.floating) and found != wanted


@functools.lru_cache(maxsize=16)
def _caster(dtype: np.dtype) -> Any:
    """Returns one program for all arrays: a thousand small ones would take a while to dispatch."""

    def cast(arrays: list[jax.Array]) -> list[jax.Array]:
        return [array.astype(dtype) for array in arrays]

    return jax.jit(cast)
