"""The only module that touches non-public symbols of Orbax. Each is probed when it is imported.

Where one is missing, `MISSING` says which, `HANDLER_BASE` is stock Orbax's public handler and the
handlers of lazy_orbax save the stock way, with a warning. Orbax 0.12 is what this was read from.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import json
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lazy_orbax.errors import StockFallbackWarning
from lazy_orbax.layout import ReplicaPolicy
from lazy_orbax.tree import Destination, LeafInfo, TreeInfo

_NEEDED = {
    "base": ("handlers.base_pytree_checkpoint_handler", "BasePyTreeCheckpointHandler"),
    "fill_args": (
        "handlers.base_pytree_checkpoint_handler",
        "_fill_missing_save_or_restore_args",
    ),
    "array_metadata_serializer": ("metadata.array_metadata_store", "Serializer"),
    "tree_metadata": ("metadata.tree", "InternalTreeMetadata"),
    "array_metadata_store": ("metadata.array_metadata_store", "Store"),
    "key_value_store": ("futures.signaling_client", "get_signaling_client"),
    "random_key_impl": ("metadata.array_metadata", "RANDOM_KEY_IMPL"),
    "sharding_metadata": ("metadata.sharding", "from_jax_sharding"),
    "process_index": ("multihost.multihost", "process_index"),
    "is_primary_host": ("multihost.multihost", "is_primary_host"),
    "operation_ids": ("futures.synchronization", "OperationIdGenerator"),
    "merge": ("serialization.ocdbt_utils", "merge_ocdbt_per_process_files"),
    "validate_array_metadatas": ("metadata.array_metadata_store", "validate_all_array_metadatas"),
    "process_subdir": ("serialization.ocdbt_utils", "get_process_index_for_subdir"),
    "is_replicated_sharding": ("serialization.jax_array_handlers", "_is_replicated_sharding"),
    "build_array_write_spec": ("serialization.tensorstore_utils", "build_array_write_spec"),
    "build_kvstore_tspec": ("serialization.tensorstore_utils", "build_kvstore_tspec"),
    "is_empty_node": ("tree.utils", "is_empty_node"),
    "is_empty_or_leaf": ("tree.utils", "is_empty_or_leaf"),
}


def _probe() -> tuple[dict[str, Any], list[str]]:
    found, missing = {}, []
    for key, (module, symbol) in _NEEDED.items():
        try:
            found[key] = getattr(importlib.import_module(f"orbax.checkpoint._src.{module}"), symbol)
        except (ImportError, AttributeError):
            missing.append(f"orbax.checkpoint._src.{module}.{symbol}")
    return found, missing


_SRC, MISSING = _probe()
# The small store that the processes of a job share; what numbers saves; this process's number; a
# store for what is kept beside arrays; whether this process, given the primary one, writes what is
# written once.
key_value_store = _SRC.get("key_value_store", lambda: None)
is_primary_host = _SRC.get("is_primary_host", lambda primary_host: primary_host in (None, 0))
operation_ids = _SRC.get("operation_ids")
process_index = _SRC.get("process_index", lambda: 0)
array_metadata_store = _SRC.get("array_metadata_store", lambda: None)
HANDLER_BASE: type = ocp.PyTreeCheckpointHandler if MISSING else _SRC["base"]


def warn_if_stock(missing: Sequence[str] = MISSING) -> bool:
    """Returns whether only the stock way is open, after warning about it."""
    if missing:
        warnings.warn(
            f"lazy_orbax does not know this orbax-checkpoint ({ocp.__version__}): "
            f"{', '.join(missing)} is missing. Saves are stock saves: correct, but blocking. "
            "Install a lazy_orbax made for this release, or an older orbax-checkpoint.",
            StockFallbackWarning,
            stacklevel=3,
        )
    return bool(missing)


def put_inside_standard_handler(
    standard: ocp.StandardCheckpointHandler, pytree: ocp.PyTreeCheckpointHandler
) -> bool:
    """Makes `standard` save and restore through `pytree`, or warns that it cannot.

    Returns:
        Whether `standard` saves lazily now.
    """
    if not isinstance(getattr(standard, "_impl", None), ocp.PyTreeCheckpointHandler):
        warn_if_stock(["StandardCheckpointHandler._impl"])
        return False
    standard._impl = pytree
    validate = getattr(standard, "_validate_save_state", None)
    supported = getattr(standard, "_supported_types", None)
    if validate is not None and supported is not None:

        def validate_by_type(item: Any, save_args: Any = None) -> Any:
            # What stock Orbax finds out leaf by leaf, in Python, depends only on their types.
            types = set(map(type, jax.tree.leaves(item)))
            is_tree = item is not None and type(item) not in types
            if is_tree and save_args is None and all(map(passes_unchanged, types)):
                return item
            return validate(item, save_args=save_args)

        def passes_unchanged(type_: type) -> bool:
            if issubclass(type_, jax.Array | np.ndarray):
                return True
            return issubclass(type_, supported) and not hasattr(type_, "__array__")

        standard._validate_save_state = validate_by_type
    return not MISSING


def operation_id() -> str:
    """Returns which save, of all that this process began, Orbax is at in this thread."""
    return operation_ids.get_current_operation_id()  # type: ignore[union-attr]


def retired_steps(manager: ocp.CheckpointManager) -> list[int] | None:
    """Returns which of its steps a manager will remove, or `None` where it cannot be asked."""
    return getattr(manager, "_get_old_steps_to_remove", lambda: None)()


def describe_tree(handler: Any, item: Any, save_args: Any, destination: Destination) -> TreeInfo:
    """Returns Orbax's view of every leaf, in the order of `jax.tree.leaves(item)`.

    Everything in it is for `destination`.

    Raises:
        LookupError: Orbax has no type handler for some leaf; the message is a list of key paths.
    """
    filled = _SRC["fill_args"](item, save_args, mode="save")
    infos = handler._get_param_infos(
        item,
        epath.Path(destination.directory),
        use_ocdbt=handler._use_ocdbt,
        use_compression=handler._use_compression,
        use_zarr3=handler._use_zarr3,
        ocdbt_target_data_file_size=destination.target_file_bytes,
    )
    is_leaf = _SRC["is_empty_or_leaf"]
    flat = [jax.tree.leaves(tree, is_leaf=is_leaf) for tree in (item, infos, filled)]
    leaves = []
    for value, info, arg in zip(*flat, strict=True):
        if not _SRC["is_empty_node"](value):
            type_handler = handler._type_handler_registry.get(type(value))
            route = _route(value, type_handler)
            leaves.append(LeafInfo(info.name, route, type_handler, info, arg))
    return TreeInfo(tuple(leaves), infos, filled, destination.directory)


def type_handler_for(handler: Any, type_: type) -> Any | None:
    """Returns Orbax's type handler for values of `type_`, or `None`."""
    registry = handler._type_handler_registry
    return registry.get(type_) if registry.has(type_) else None


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


def primary_host(handler: Any) -> int | None:
    """Returns the process that writes what is written once."""
    return handler._primary_host


async def finalize(handler: Any, directory: Any, context: Any) -> None:
    """Does what the stock `finalize` does, with a TensorStore context of ours."""
    store, primary = handler._array_metadata_store, handler._primary_host
    if store is not None and primary is not None and is_primary_host(primary):
        validator = handler._array_metadata_validator
        await _SRC["validate_array_metadatas"](validator, store, directory)
    zarr3, validate = handler._use_zarr3, handler._enable_post_merge_validation
    await _SRC["merge"](directory, ts_context=context, use_zarr3=zarr3, enable_validation=validate)


def key_metadata(key: jax.Array) -> dict[str, str]:
    """Returns what Orbax stores beside the data of a typed PRNG key."""
    return {_SRC["random_key_impl"]: str(jax.random.key_impl(key))}


def array_write_spec(
    leaf: LeafInfo,
    *,
    shape: tuple[int, ...],
    write_shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    ext_metadata: dict[str, str] | None,
) -> tuple[dict[str, Any], Any]:
    """Returns TensorStore's spec of a leaf and Orbax's `ArrayMetadata` for it."""
    type_handler, use_ocdbt = leaf.type_handler, leaf.info.is_ocdbt_checkpoint
    separate = (
        sharding is not None
        and use_ocdbt
        and type_handler._use_replica_parallel
        and type_handler._enable_replica_parallel_separate_folder
        and _SRC["is_replicated_sharding"](sharding)
    )
    process_id = _SRC["process_subdir"](
        use_ocdbt, getattr(type_handler, "_override_ocdbt_process_id", None)
    )
    save_args = leaf.save_args
    if save_args.dtype is not None:  # Orbax wants a dtype where users may give its name.
        save_args = dataclasses.replace(save_args, dtype=jnp.dtype(save_args.dtype))
    spec = _SRC["build_array_write_spec"](
        info=leaf.info,
        arg=save_args,
        global_shape=shape,
        local_shape=write_shape,
        dtype=dtype,
        use_ocdbt=use_ocdbt,
        process_index=process_id,
        replica_separate_folder=separate,
        metadata_key=type_handler._metadata_key,
        ext_metadata=ext_metadata,
    )
    return spec.json, spec.metadata


def directory_kvstore_spec(directory: str) -> dict[str, Any]:
    """Returns the spec of a directory, or an address, as a plain key-value store."""
    return _SRC["build_kvstore_tspec"](directory, use_ocdbt=False)


def tree_metadata(
    handler: Any, tree: TreeInfo, write_shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Returns the content of `_METADATA`, without custom metadata."""

    def complete(info: Any) -> Any:
        return info.replace(write_shape=write_shapes.get(info.name, info.write_shape))

    return (
        _SRC["tree_metadata"]
        .build(
            jax.tree.map(complete, tree.infos),
            save_args=tree.save_args,
            use_ocdbt=handler._use_ocdbt,
            use_zarr3=handler._use_zarr3,
            pytree_metadata_options=handler._pytree_metadata_options,
        )
        .to_json()
    )


def sharding_file(
    type_handler: Any, shardings: Sequence[tuple[str, jax.sharding.Sharding]]
) -> bytes | None:
    """Returns the content of `_sharding`, or `None` where the type handler writes none."""
    if not type_handler._enable_write_sharding_file:
        return None
    entries = {}
    for name, sharding in shardings:
        metadata = _SRC["sharding_metadata"](sharding)
        if metadata is not None and (text := metadata.to_serialized_string()) is not None:
            entries[base64.urlsafe_b64encode(name.encode()).decode()] = text
    return json.dumps(entries).encode()


def stores_array_metadata(type_handler: Any) -> bool:
    """Whether write shapes are stored: not for an `ArrayHandler` that was made without a store."""
    return getattr(type_handler, "_array_metadata_store", None) is not None


def array_metadatas_file(type_handler: Any, metadatas: Sequence[Any]) -> bytes | None:
    """Returns the content of `array_metadatas/process_N`, or `None` where there is no store."""
    if not stores_array_metadata(type_handler):
        return None
    return _SRC["array_metadata_serializer"]().serialize(list(metadatas)).encode()
