"""What Orbax would write: specs, metadata and the small files beside the arrays."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lazy_orbax._orbax.multihost import is_primary_host
from lazy_orbax._orbax.records import LeafInfo, Settings, TreeInfo
from lazy_orbax._orbax.symbols import SRC


def key_metadata(key: jax.Array) -> dict[str, str]:
    """Returns what Orbax stores beside the data of a typed PRNG key."""
    return {SRC["random_key_impl"]: str(jax.random.key_impl(key))}


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
        and SRC["is_replicated_sharding"](sharding)
    )
    process_id = SRC["process_subdir"](
        use_ocdbt, getattr(type_handler, "_override_ocdbt_process_id", None)
    )
    save_args = leaf.save_args
    if save_args.dtype is not None:  # Orbax wants a dtype where users may give its name.
        save_args = dataclasses.replace(save_args, dtype=jnp.dtype(save_args.dtype))
    spec = SRC["build_array_write_spec"](
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
    return SRC["build_kvstore_tspec"](directory, use_ocdbt=False)


def tree_metadata(
    settings: Settings, tree: TreeInfo, write_shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Returns the content of `_METADATA`, without custom metadata."""

    def complete(info: Any) -> Any:
        return info.replace(write_shape=write_shapes.get(info.name, info.write_shape))

    return (
        SRC["tree_metadata"]
        .build(
            jax.tree.map(complete, tree.infos),
            save_args=tree.save_args,
            use_ocdbt=settings.use_ocdbt,
            use_zarr3=settings.use_zarr3,
            pytree_metadata_options=settings.tree_options,
        )
        .to_json()
    )


def sharding_file(
    type_handler: Any, shardings: Sequence[tuple[str, jax.sharding.Sharding]]
) -> bytes | None:
    """Returns the content of `_sharding`, or `None` where Orbax writes none: it would be empty."""
    if not type_handler._enable_write_sharding_file:
        return None
    entries = {}
    for name, sharding in shardings:
        metadata = SRC["sharding_metadata"](sharding)
        if metadata is not None and (text := metadata.to_serialized_string()) is not None:
            entries[base64.urlsafe_b64encode(name.encode()).decode()] = text
    return json.dumps(entries).encode() if entries else None


def stores_array_metadata(type_handler: Any) -> bool:
    """Whether write shapes are stored: not for an `ArrayHandler` that was made without a store."""
    return getattr(type_handler, "_array_metadata_store", None) is not None


def array_metadatas_file(type_handler: Any, metadatas: Sequence[Any]) -> bytes | None:
    """Returns the content of `array_metadatas/process_N`, or `None` where there is no store."""
    if not stores_array_metadata(type_handler):
        return None
    return SRC["array_metadata_serializer"]().serialize(list(metadatas)).encode()


async def finalize(settings: Settings, directory: Any, context: Any) -> None:
    """Does what the stock `finalize` does, with a TensorStore context of ours."""
    store, primary = settings.array_metadata_store, settings.primary_host
    if store is not None and primary is not None and is_primary_host(primary):
        validator = settings.array_metadata_validator
        await SRC["validate_array_metadatas"](validator, store, directory)
    zarr3, validate = settings.use_zarr3, settings.validates_merge
    await SRC["merge"](directory, ts_context=context, use_zarr3=zarr3, enable_validation=validate)
