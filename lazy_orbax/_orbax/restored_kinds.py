"""How Orbax would restore a leaf, where that is so simple that others may do it."""

from __future__ import annotations

from typing import Any

import jax

from lazy_orbax._orbax.symbols import SRC, ocp

ARRAY, NUMPY, SCALAR, OTHER = "array", "numpy", "scalar", "other"
# What Orbax writes as the type of what has no content.
EMPTY = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})


def kind_of(registry: Any, restore_type: Any) -> str:
    """Returns how a leaf is restored: as the stock type handlers do it, or in some other way.

    Args:
        registry: the handler's type handlers.
        restore_type: the type that was asked for, or the one in the checkpoint.
    """
    try:
        handler = registry.get(restore_type)
    except ValueError:
        return OTHER
    kind, stock = type(handler), ocp.type_handlers.ArrayHandler
    if issubclass(kind, stock):
        is_stock = kind.deserialize is stock.deserialize
        return ARRAY if is_stock and getattr(handler, "_dispatcher", None) is None else OTHER
    if kind is ocp.type_handlers.NumpyHandler:
        return NUMPY
    return SCALAR if kind is ocp.type_handlers.ScalarHandler else OTHER


def flat_target(item: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns the leaves of a target with their key paths, and its structure.

    What is empty is a leaf, as in what Orbax stores.
    """
    return jax.tree_util.tree_flatten_with_path(item, is_leaf=SRC["is_empty_or_leaf"])


def is_empty(node: Any) -> bool:
    """Whether a leaf of `flat_target` is an empty node."""
    return SRC["is_empty_node"](node)


def sharding_of(args: Any) -> Any:
    """Returns the sharding that `ArrayRestoreArgs` ask for; `None` where that is not simple."""
    if args.mesh is not None and args.mesh_axes is not None:
        return jax.sharding.NamedSharding(args.mesh, args.mesh_axes)
    return args.sharding if isinstance(args.sharding, jax.sharding.Sharding) else None


def completed(args: Any, leaf: Any) -> Any:
    """Returns `ArrayRestoreArgs` with the shape and dtype that Orbax takes from a target's leaf."""
    return SRC["fill_args"](leaf, args, mode="restore")
