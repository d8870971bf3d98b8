"""What a restore target asks for, leaf by leaf, and which leaves only Orbax can restore."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lazy_orbax._orbax import restored_kinds
from lazy_orbax._orbax.restored_kinds import ARRAY, OTHER, SCALAR
from lazy_orbax._orbax.stored_kinds import EMPTY
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import RestoreError
from lazy_orbax.integrity.array_format import ArrayFormat, native
from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.trust.tree_file import Tree

_PLACEHOLDER = ...


class Wanted(NamedTuple):
    """A leaf that is to be read.

    Attributes:
        position: of the leaf in the target.
        name: as Orbax names it.
        kind: what becomes of it: an array on devices, a NumPy array or a number.
        form: how it is stored; `None` if it is made of several, or of a part of one.
        shape: its shape.
        dtype: in which it is wanted.
        sharding: of an array on devices.
        restore_type: of a number: what makes it, if that is not its dtype.
    """

    position: int
    name: str
    kind: str
    form: ArrayFormat | None
    shape: Shape
    dtype: np.dtype
    sharding: Any = None
    restore_type: Any = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A target, taken apart.

    Attributes:
        structure: of the target; what is empty counts as a leaf.
        values: its leaves; those that are wanted are not there yet.
        wanted: what is to be read.
        others: the leaves that Orbax restores, by name, with the reason.
    """

    structure: Any
    values: list[Any]
    wanted: list[Wanted]
    others: dict[str, str]


class OrbaxOnlyError(Exception):
    """Why a target, as a whole, is for Orbax."""


class MisfitError(RestoreError):
    """A leaf is wanted in another shape than what is stored, and Orbax would refuse it."""


def requested(args: Any, tree: Tree, formats: Mapping[str, ArrayFormat], registry: Any) -> Request:
    """Takes a restore target apart.

    Args:
        args: Orbax's arguments for a restore.
        tree: what the checkpoint's `_METADATA` says.
        formats: how each array is stored, by name.
        registry: the type handlers.

    Raises:
        OrbaxOnlyError: Orbax must restore it as a whole, or refuse it.
        MisfitError: a leaf has another shape: nothing need be read.
    """
    item, is_part = getattr(args, "item", None), getattr(args, "partial_restore", False)
    if item is None or getattr(args, "transforms", None) is not None:
        raise OrbaxOnlyError("no target" if item is None else "transformations of Orbax")
    if tree.is_rich:
        raise OrbaxOnlyError("a tree with rich types")
    leaves, structure = restored_kinds.flat_target(item)
    if is_part and any(leaf is _PLACEHOLDER for _, leaf in leaves):
        raise OrbaxOnlyError("a part of the tree, with placeholders, which Orbax fills there")
    arguments = _arguments(args, structure, len(leaves))
    try:
        paths = [restored_kinds.path_of(path) for path, _ in leaves]
    except TypeError as error:
        raise OrbaxOnlyError(str(error)) from error
    missing = set(paths) - tree.paths.keys()
    if missing or (len(set(paths)) != len(tree.paths) and not is_part):
        raise OrbaxOnlyError("another structure than the checkpoint's")
    found = Request(structure, [leaf for _, leaf in leaves], [], {})
    kinds = functools.cache(functools.partial(restored_kinds.kind_of, registry))
    for position, (path, argument) in enumerate(zip(paths, arguments, strict=True)):
        name, leaf = tree.paths[path], found.values[position]
        if _is_nothing(name, leaf, tree):
            continue
        kind = kinds(getattr(argument, "restore_type", None) or tree.leaves[name])
        one = _wanted(_Leaf(position, name, leaf), kind, argument, formats.get(name))
        if isinstance(one, str):
            found.others[name] = one
        else:
            found.wanted.append(one)
    if is_part and found.others:
        raise OrbaxOnlyError("a part of the tree, with leaves that only Orbax restores")
    return found


def _is_nothing(name: str, leaf: Any, tree: Tree) -> bool:
    """Whether a leaf stays what it is in the target: a placeholder, or what is empty."""
    if leaf is _PLACEHOLDER:
        return True
    is_empty = restored_kinds.is_empty(leaf)
    if is_empty != (tree.leaves[name] in EMPTY):
        raise OrbaxOnlyError(f"leaf {name} is empty in the target or the checkpoint alone")
    return is_empty


def _arguments(args: Any, structure: Any, n_leaves: int) -> list[Any]:
    given = getattr(args, "restore_args", None)
    if given is None:
        return [None] * n_leaves
    try:
        found = structure.flatten_up_to(given)
    except ValueError as error:
        raise OrbaxOnlyError("restore_args of another structure") from error
    return [one if isinstance(one, ocp.RestoreArgs) else None for one in found]


class _Leaf(NamedTuple):
    position: int
    name: str
    target: Any


def _wanted(leaf: _Leaf, kind: str, argument: Any, form: ArrayFormat | None) -> Wanted | str:
    """Returns what is wanted of a leaf, or why Orbax has to restore it."""
    if kind == OTHER or form is None:
        return "its type handler is not one of Orbax's own for arrays and numbers"
    if kind == ARRAY:
        return _wanted_array(leaf, argument, form)
    if kind == SCALAR and form.shape:
        return "it is stored as an array and wanted as a number"
    dtype = getattr(argument, "dtype", None)
    dtype = form.dtype if dtype is None else native(dtype)
    restore_type = getattr(argument, "restore_type", None) if kind == SCALAR else None
    return Wanted(leaf.position, leaf.name, kind, form, form.shape, dtype, None, restore_type)


def _wanted_array(leaf: _Leaf, argument: Any, form: ArrayFormat) -> Wanted | str:
    if type(argument) is not ocp.ArrayRestoreArgs:
        return "its restore_args are not ArrayRestoreArgs"
    if not argument.strict:
        return "strict=False cuts or pads it"
    sharding = restored_kinds.sharding_of(argument)
    if sharding is None:
        return "there is no sharding for it, or one with a layout"
    if argument.dtype is None or argument.global_shape is None:
        argument = restored_kinds.completed(argument, leaf.target)
    shape, dtype = argument.global_shape, argument.dtype
    dtype = form.dtype if dtype is None else dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return "it is wanted in a dtype of JAX's own"
    if shape is not None and tuple(shape) != form.shape:
        what = f"leaf {leaf.name}: wanted {list(shape)}, found {list(form.shape)}"
        raise MisfitError(f"{what}: it is not compatible with the stored shape")
    dtype = np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return f"{dtype} is not enabled in JAX"
    if not is_in_default_memory(sharding):
        return "it is wanted in another memory than the devices' own"
    return Wanted(leaf.position, leaf.name, ARRAY, form, form.shape, dtype, sharding)


@functools.lru_cache(maxsize=4096)
def is_in_default_memory(sharding: jax.sharding.Sharding) -> bool:
    """Whether a sharding is of the memory that programs read."""
    devices = sharding.addressable_devices
    kinds = {device.default_memory().kind for device in devices}
    return sharding.memory_kind is None or kinds <= {sharding.memory_kind}


class Shards(NamedTuple):
    """The boxes that this process needs of an array.

    Attributes:
        boxes: each distinct one.
        of_devices: for each addressable device, which of them it has; 0 if there are none.
    """

    boxes: tuple[Box, ...]
    of_devices: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def shards_of(sharding: jax.sharding.Sharding | None, shape: Shape) -> Shards:
    """Returns what this process needs of an array; of one in host memory, all.

    Args:
        sharding: of the array; `None` is host memory.
        shape: of the array.
    """
    if sharding is None:
        starts = [(0,) * len(shape)]
        part = shape
    else:
        where = sharding.addressable_devices_indices_map(shape)
        starts = [tuple(s.start or 0 for s in index or ()) for index in where.values()]
        part = tuple(sharding.shard_shape(shape))
    if math.prod(part) == 0:
        return Shards((), (0,) * len(starts))
    distinct = {start: i for i, start in enumerate(dict.fromkeys(starts))}
    boxes = tuple(Box(start, part) for start in distinct)
    return Shards(boxes, tuple(distinct[start] for start in starts))
