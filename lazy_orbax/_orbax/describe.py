"""What Orbax says of a tree: names, type handlers, who writes it."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath

from lazy_orbax._orbax.records import Destination, LeafInfo, Settings, TreeInfo
from lazy_orbax._orbax.symbols import SRC, ocp
from lazy_orbax.plan.shards import ReplicaPolicy


def settings_of(handler: Any, keywords: dict[str, Any]) -> Settings:
    """Returns how a handler of Orbax's kind saves.

    Args:
        handler: an instance of `symbols.HANDLER_BASE`.
        keywords: what it was made with.
    """
    return Settings(
        tuple(sorted((name, repr(value)) for name, value in keywords.items())),
        use_ocdbt=handler._use_ocdbt,
        use_zarr3=handler._use_zarr3,
        use_compression=handler._use_compression,
        primary_host=handler._primary_host,
        type_handlers=handler._type_handler_registry,
        param_infos=handler._get_param_infos,
        tree_options=handler._pytree_metadata_options,
        array_metadata_store=handler._array_metadata_store,
        array_metadata_validator=handler._array_metadata_validator,
        validates_merge=handler._enable_post_merge_validation,
    )


def type_handlers_of(handler: Any) -> Any:
    """Returns the type handlers of a handler of Orbax's kind."""
    return handler._type_handler_registry


def describe_tree(
    settings: Settings, item: Any, save_args: Any, destination: Destination
) -> TreeInfo:
    """Returns Orbax's view of every leaf, in the order of `jax.tree.leaves(item)`.

    Everything in it is for `destination`.

    Raises:
        LookupError: Orbax has no type handler for some leaf; the message is a list of key paths.
    """
    filled = SRC["fill_args"](item, save_args, mode="save")
    infos = settings.param_infos(
        item,
        epath.Path(destination.directory),
        use_ocdbt=settings.use_ocdbt,
        use_compression=settings.use_compression,
        use_zarr3=settings.use_zarr3,
        ocdbt_target_data_file_size=destination.target_file_bytes,
    )
    is_leaf = SRC["is_empty_or_leaf"]
    flat = [jax.tree.leaves(tree, is_leaf=is_leaf) for tree in (item, infos, filled)]
    leaves = []
    for value, info, arg in zip(*flat, strict=True):
        if not SRC["is_empty_node"](value):
            type_handler = settings.type_handlers.get(type(value))
            route = _route(value, type_handler)
            leaves.append(LeafInfo(info.name, route, type_handler, info, arg))
    return TreeInfo(tuple(leaves), infos, filled, destination.directory)


def _route(value: Any, type_handler: Any) -> str:
    """Whether a leaf's type handler does what the stock one does, so that we may do it."""
    kind = type(type_handler)
    if isinstance(value, jax.Array):
        stock = ocp.type_handlers.ArrayHandler
        lazy = issubclass(kind, stock) and kind.serialize is stock.serialize
        return "array" if lazy and getattr(type_handler, "_dispatcher", None) is None else "other"
    for stock in (ocp.type_handlers.NumpyHandler, ocp.type_handlers.ScalarHandler):
        if kind is stock:
            return "host"
    return "other"


def replica_policy(array_handler: Any) -> ReplicaPolicy:
    """Returns which replicas write, as the type handler for `jax.Array`, if any, has it."""
    if array_handler is None:
        return ReplicaPolicy()
    return ReplicaPolicy(
        replica_id=array_handler._replica_id,
        parallel=array_handler._use_replica_parallel,
        min_slice_bytes=array_handler._min_slice_bytes_for_replica_parallel or 0,
        max_replicas=array_handler._max_replicas_for_replica_parallel,
    )
