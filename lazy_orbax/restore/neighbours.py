"""Leaves that are rebuilt from those of neighbouring layers, and their moments."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lazy_orbax import _paths
from lazy_orbax._jax_context import neutral
from lazy_orbax.errors import OptionError
from lazy_orbax.plan.transforms.moments import MOMENTS, find_moments
from lazy_orbax.plan.transforms.rules import cast, drop, select, unstack
from lazy_orbax.plan.transforms.scalars import is_float
from lazy_orbax.plan.transforms.transform_map import TransformMap
from lazy_orbax.restore.load import load
from lazy_orbax.restore.replacements import FromNeighbours
from lazy_orbax.storage.places import place_of

LEARNING_RATE_FACTOR = 1.1
NORMS = "gradient_norms"
_ADDED = 1e-4
# CheckFree keeps copies of these: no layer beside them is like them.
_ENDS = re.compile(
    r"embed|vocab|(?:^|[._])(?:(?:lm_)?head|wte|wpe|pos(?:ition)?|logits)(?:[._]|$)", re.IGNORECASE
)
# What begins as something else than zeros.
_NOT_ZEROS = frozenset({"params0", "init_params", "init_particles", "x0", "z", "step_sizes"})


class FreshMoment(NamedTuple):
    """A replacement of our own: zeros, for the moment of a parameter that is rebuilt.

    Attributes:
        parameter: the parameter's name.
        rebuilt: how that is rebuilt.
    """

    parameter: str
    rebuilt: FromNeighbours


def refuse_neighbours(leaves: Mapping[str, Any], replacements: Mapping[str, Any]) -> None:
    """Checks that each leaf can be rebuilt of its neighbours.

    Args:
        leaves: of the target, by name.
        replacements: those that were given.

    Raises:
        OptionError: one cannot be.
    """
    for name, one in replacements.items():
        if isinstance(one, FromNeighbours) and (
            problem := _problem(name, one, leaves, replacements)
        ):
            raise OptionError(f"The replacement of {name}, {one}: {problem}.")


def _problem(
    name: str, one: FromNeighbours, leaves: Mapping[str, Any], replacements: Mapping[str, Any]
) -> str | None:
    if _ENDS.search(name):
        return "an embedding or a head is like no other layer; give FromStep, or an array"
    mine = _kind(leaves[name])
    if not is_float(mine[1]):
        return f"found {mine[1]}, wanted a floating-point dtype, for it becomes a mean"
    if one.layer is not None:
        n = mine[0][one.axis] if one.axis < len(mine[0]) else 0
        fits = n >= 2 and one.layer < n
        return None if fits else f"found {list(mine[0])}, which has no such layer with a neighbour"
    for neighbour in filter(None, (one.before, one.after)):
        if neighbour not in leaves:
            return f"the target has no leaf {neighbour!r}"
        if neighbour == name or neighbour in replacements:
            return f"{neighbour} is to be replaced itself"
        if (found := _kind(leaves[neighbour])) != mine:
            return f"{neighbour} is {found[1]}{list(found[0])}, wanted {mine[1]}{list(mine[0])}"
    return None


def _kind(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return np.shape(leaf), getattr(leaf, "dtype", type(leaf))


def moments_of(
    leaves: Mapping[str, Any], replacements: Mapping[str, Any]
) -> dict[str, FreshMoment]:
    """Returns the moments of the leaves that may be rebuilt, by name.

    Raises:
        OptionError: one does not begin as zeros, or has no such layer.
    """
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    found = {}
    for name, moment in find_moments(shapes, MOMENTS).items():
        parameter = moment.parameter(name)
        one = replacements.get(parameter)
        if not isinstance(one, FromNeighbours) or name in replacements:
            continue
        has_layer = one.layer is None or moment.is_alike
        if moment.head.rpartition(".")[2] in _NOT_ZEROS or not has_layer:
            raise OptionError(
                f"{name} belongs to {parameter}, which is rebuilt, and does not begin as zeros of "
                "its shape. Give it a replacement of its own."
            )
        found[name] = FreshMoment(parameter, one)
    return found


def rebuilt(
    name: str, one: FromNeighbours, found: Mapping[str, Any], target: Any, directory: str
) -> tuple[Any, str]:
    """Returns a leaf made of its neighbours, and what it was made of.

    Args:
        name: the leaf.
        one: its neighbours.
        found: the leaves that were restored.
        target: what is wanted: shape, dtype and, if it is on devices, sharding.
        directory: the item's directory.

    Raises:
        OptionError: the norms that were saved are none.
        CorruptCheckpointError: of a stack, other layers are lost as well.
    """
    norms = _norms_in(directory) if one.weights is None else {}
    if one.layer is not None:
        layers = _layers(directory, name, one, target)
        near = [i for i in (one.layer - 1, one.layer + 1) if i in layers]
        weights = _weights(one.weights, [_norm(norms, name, i) for i in near])
        layers[one.layer] = _mean([layers[i] for i in near], weights)
        by = _said([f"layer {i}" for i in near], weights)
        return np.stack([layers[i] for i in sorted(layers)], one.axis), by
    near = [neighbour for neighbour in (one.before, one.after) if neighbour is not None]
    weights = _weights(one.weights, [_norm(norms, neighbour) for neighbour in near])
    arrays = [found[neighbour] for neighbour in near]
    by = _said(near, weights)
    if not all(isinstance(array, jax.Array) for array in arrays):
        return _mean([np.asarray(array) for array in arrays], weights), by
    sharding = getattr(target, "sharding", None) or arrays[0].sharding
    with neutral():
        return jax.jit(lambda *parts: _mean(parts, weights), out_shardings=sharding)(*arrays), by


def fresh(
    name: str, one: FreshMoment, found: Mapping[str, Any], target: Any, directory: str
) -> tuple[Any, str]:
    """Returns zeros for a moment, or for its layer. The arguments are those of `rebuilt`."""
    layer, axis = one.rebuilt.layer, one.rebuilt.axis
    by = "zeros" if layer is None else f"zeros in layer {layer}"
    shape, dtype = _kind(target)
    if layer is None:
        return np.zeros(shape, dtype), by
    index = (*(slice(None),) * axis, layer)
    if name not in found:  # It is lost there as well.
        layers = _layers(directory, name, one.rebuilt, target)
        layers[layer] = np.zeros((*shape[:axis], *shape[axis + 1 :]), dtype)
        return np.stack([layers[i] for i in sorted(layers)], axis), by
    value = found[name]
    if not isinstance(value, jax.Array):
        value = np.array(value)
        value[index] = 0
        return value, by
    with neutral():
        return jax.jit(lambda x: x.at[index].set(0), out_shardings=value.sharding)(value), by


def _layers(directory: str, name: str, one: FromNeighbours, target: Any) -> dict[int, np.ndarray]:
    """Returns the layers of a stack but for the lost one, which is not read."""
    shape, dtype = _kind(target)
    kept = [i for i in range(shape[one.axis]) if i != one.layer]
    inner = (*shape[: one.axis], *shape[one.axis + 1 :])
    like = {"layer": {str(i): jax.ShapeDtypeStruct(inner, dtype) for i in kept}}
    pattern = re.escape(name)
    rules = [
        select(pattern),
        unstack(pattern, "layer.{layer}", one.axis),
        drop(f"layer.{one.layer}"),
        cast(r"layer\..*", dtype),
    ]
    found = load(directory, like, transforms=TransformMap(rules))
    return {i: found["layer"][str(i)] for i in kept}


def _mean(arrays: Sequence[Any], weights: Sequence[float]) -> Any:
    """Returns the weighted mean, in float32 where the arrays are narrower."""
    dtype = arrays[0].dtype
    wide = dtype if dtype.itemsize >= 4 else np.dtype(np.float32)
    shares = [wide.type(weight / sum(weights)) for weight in weights]
    parts = [array.astype(wide) * share for array, share in zip(arrays, shares, strict=True)]
    return functools.reduce(operator.add, parts).astype(dtype)


def _weights(given: Sequence[float] | None, norms: Sequence[float | None]) -> list[float]:
    """Returns what each of the neighbours weighs."""
    if len(norms) == 1:
        return [1.0]
    if given is not None:
        return list(map(float, given))
    known = [norm for norm in norms if norm is not None]
    return [1.0] * len(norms) if len(known) < len(norms) else [norm + _ADDED for norm in known]


def _said(names: Sequence[str], weights: Sequence[float]) -> str:
    if len(names) == 1:
        return f"a copy of {names[0]}"
    total = sum(weights)
    return " + ".join(f"{w / total:.3g} * {name}" for name, w in zip(names, weights, strict=True))


def _norms_in(directory: str) -> Mapping[str, Any]:
    """Returns the norms in the custom metadata of an item, of which digests were compared."""
    tree = json.loads(place_of(directory).read(_paths.TREE))
    custom = tree.get("custom_metadata") or {}
    found = custom.get(NORMS, {}) if isinstance(custom, dict) else {}
    if not isinstance(found, dict):
        raise OptionError(f"{NORMS} in the custom metadata: found {found!r}, wanted an object.")
    return found


def _norm(norms: Mapping[str, Any], name: str, layer: int | None = None) -> float | None:
    """Returns the norm of a leaf, or of the smallest tree that has one and in which it is."""
    trees = [tree for tree in norms if name == tree or name.startswith(f"{tree}.")]
    if not trees:
        return None
    tree = max(trees, key=len)
    value = norms[tree]
    if layer is not None and isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    raise OptionError(f"{NORMS} of {tree}: found {norms[tree]!r}, wanted norms, at least 0.")
