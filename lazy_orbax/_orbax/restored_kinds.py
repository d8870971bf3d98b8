"""How Orbax would restore a leaf, where that is so simple that others may do it."""

from __future__ import annotations

from typing import Any

import jax

from lazy_orbax._orbax.stored_kinds import DICT, SEQUENCE
from lazy_orbax._orbax.symbols import SRC, ocp

ARRAY, NUMPY, SCALAR, OTHER = "array", "numpy", "scalar", "other"


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


def path_of(path: Any) -> tuple[tuple[int, str], ...]:
    """Returns a key path as Orbax stores it: for each key its kind, and its text.

    Raises:
        TypeError: it has keys of a kind that Orbax alone knows how to store.
    """
    found = []
    for key in path:
        kind = type(key)
        if kind is jax.tree_util.DictKey:
            found.append((DICT, str(key.key)))
        elif kind is jax.tree_util.GetAttrKey:
            found.append((DICT, key.name))
        elif kind is jax.tree_util.SequenceKey:
            found.append((SEQUENCE, str(key.idx)))
        else:
            raise TypeError(f"keys of type {kind.__name__}")
    return tuple(found)


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


def stored_shape(entry: Any) -> Any:
    """Returns the shape of what Orbax's metadata says of a leaf; `None` if it has none.

    v1 has an entry of its own inside that of v0.
    """
    return getattr(getattr(entry, "v1_metadata", entry), "shape", None)


def sharding_of_key_data(sharding: Any, n_more: int) -> Any:
    """Returns the sharding of the data of typed PRNG keys, which has more axes than the keys."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = (*sharding.spec, *[None] * n_more)
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
