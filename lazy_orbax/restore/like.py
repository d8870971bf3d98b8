"""The tree that `load` is to return, as a list of leaves that are wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax import restored_kinds
from lazy_orbax._orbax.restored_kinds import ARRAY, NUMPY, SCALAR
from lazy_orbax._orbax.stored_kinds import SEQUENCE
from lazy_orbax.errors import RestoreError, summarize
from lazy_orbax.integrity.array_format import ArrayFormat, is_numeric, native
from lazy_orbax.plan.boxes import Shape
from lazy_orbax.plan.shards import is_key
from lazy_orbax.restore.wanted import Wanted, is_in_default_memory
from lazy_orbax.trust.tree_file import Tree

Rule = Callable[[str, Shape], Any]
"""Returns the `PartitionSpec` of a leaf, of its name and shape."""
_EMPTY: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
    "NamedTuple": tuple,
}
_NUMBERS = (bool, int, float, complex)
STRING = "string"


@dataclasses.dataclass
class Likeness:
    """A tree whose leaves are not there yet.

    Attributes:
        wanted: the leaves that are read.
        strings: positions of the leaves that are strings, by name.
        keys: names of the leaves that are to be typed PRNG keys, by position.
        leaves: all leaves.
        rebuild: makes the tree of its leaves.
    """

    wanted: list[Wanted]
    strings: dict[str, int]
    keys: dict[int, str]
    leaves: list[Any]
    rebuild: Callable[[list[Any]], Any]


def likeness_of_stored(tree: Tree, formats: Mapping[str, ArrayFormat]) -> Likeness:
    """Returns the tree that was saved, as nested dictionaries and lists of NumPy arrays.

    Args:
        tree: what the checkpoint says of it.
        formats: how each array is stored, by name.

    Raises:
        RestoreError: there are leaves of a kind that only their own type handler can restore.
    """
    found = Likeness([], {}, {}, [], lambda leaves: _nested(tree, leaves))
    strange = []
    for position, name in enumerate(tree.paths.values()):
        kind, form = tree.leaves[name], formats.get(name)
        found.leaves.append(_EMPTY[kind]() if kind in _EMPTY else None)
        if kind == STRING:
            found.strings[name] = position
        elif form is not None:
            becomes = SCALAR if kind == "scalar" and not form.shape else NUMPY
            found.wanted.append(Wanted(position, name, becomes, form, form.shape, form.dtype))
        elif kind not in _EMPTY:
            strange.append(f"leaf {name}: found {kind}, wanted an array, a number or a string")
    if strange:
        raise RestoreError(
            f"load cannot restore what type handlers of yours wrote:{summarize(strange)}"
        )
    return found


def _nested(tree: Tree, leaves: list[Any]) -> Any:
    root: dict[Any, Any] = {}
    for path, value in zip(tree.paths, leaves, strict=True):
        if not path:
            return value
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _Leaf(value)
    return _unwrapped(root)


@dataclasses.dataclass
class _Leaf:
    value: Any


def _unwrapped(node: Any) -> Any:
    if isinstance(node, _Leaf):
        return node.value
    if node and next(iter(node))[0] == SEQUENCE:
        return [_unwrapped(node[key]) for key in sorted(node, key=lambda key: int(key[1]))]
    return {name: _unwrapped(inner) for (_, name), inner in node.items()}


def likeness_of(
    like: Any, formats: Mapping[str, ArrayFormat] | None, mesh: Any, rule: Rule | None
) -> Likeness:
    """Returns the tree that a target describes.

    Args:
        like: arrays or `jax.ShapeDtypeStruct`s: on devices where they have a sharding, else NumPy;
            numbers and strings.
        formats: how each array is stored, by name; `None` where leaves are made by rules.
        mesh: where all arrays go instead.
        rule: how they are divided there.

    Raises:
        RestoreError: leaves do not fit what is stored.
    """
    leaves, structure = restored_kinds.flat_target(like)
    found = Likeness([], {}, {}, [leaf for _, leaf in leaves], structure.unflatten)
    problems = []
    for position, (path, leaf) in enumerate(leaves):
        name = ".".join(text for _, text in restored_kinds.path_of(path))
        if restored_kinds.is_empty(leaf):
            continue
        if isinstance(leaf, str):
            found.strings[name] = position
            continue
        form = formats.get(name) if formats is not None else None
        if formats is not None and form is None:
            problems.append(f"leaf {name}: found no such array, wanted {_brief(leaf)}")
            continue
        one = _wanted(position, name, leaf, form, found.keys)
        if isinstance(one, Wanted) and mesh is not None and one.kind != SCALAR:
            place = _on_mesh(mesh, rule, one)
            one = Wanted(position, name, ARRAY, form, one.shape, one.dtype, place)
        if isinstance(one, str):
            problems.append(f"leaf {name}: {one}")
        else:
            found.wanted.append(one)
    if problems:
        raise RestoreError(f"What is wanted does not fit the checkpoint:{summarize(problems)}")
    return found


def _wanted(
    position: int, name: str, leaf: Any, form: ArrayFormat | None, keys: dict[int, str]
) -> Wanted | str:
    if type(leaf) in _NUMBERS:
        if form is not None and form.shape:
            return f"found {list(form.shape)}, wanted a number"
        dtype = form.dtype if form is not None else np.asarray(leaf).dtype
        return Wanted(position, name, SCALAR, form, (), dtype, None, type(leaf))
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return f"found {_brief(leaf)}, wanted an array, its shape and dtype, a number or a string"
    sharding = getattr(leaf, "sharding", None)
    shape, dtype = tuple(leaf.shape), leaf.dtype
    if is_key(leaf):
        keys[position] = name
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        shape, dtype = data.shape, data.dtype
        sharding = restored_kinds.sharding_of_key_data(sharding, len(shape) - len(leaf.shape))
    if (form is None or dtype != form.dtype) and not is_numeric(np.dtype(dtype)):
        return f"found dtype {dtype}, wanted one of numbers or booleans"
    if form is not None and shape != form.shape:
        return f"found {list(form.shape)}, wanted {list(shape)}; give the stored shape"
    if sharding is not None and not is_in_default_memory(sharding):
        return "found a sharding in another memory than the devices' own, wanted that"
    kind = NUMPY if sharding is None else ARRAY
    return Wanted(position, name, kind, form, shape, native(dtype), sharding)


def _on_mesh(mesh: Any, rule: Rule | None, leaf: Wanted) -> Any:
    spec = rule(leaf.name, leaf.shape) if rule is not None else jax.sharding.PartitionSpec()
    if isinstance(spec, jax.sharding.Sharding):
        return spec
    return jax.sharding.NamedSharding(mesh, spec)


def _brief(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__
