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

# What Orbax's `ParamInfo` says of one leaf alone, in all its versions.
_OWN = frozenset(("name", "keypath", "path", "_path"))


def key_metadata(key: jax.Array) -> dict[str, str]:
    """Returns what Orbax stores beside the data of a typed PRNG key."""
    return {SRC["random_key_impl"]: str(jax.random.key_impl(key))}


class ArraySpecs:
    """Asks Orbax how arrays are stored: once for all leaves of a tree that differ in the name only.

    Orbax puts the name into a spec as the path in the key-value store, and nowhere else.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[dict[str, Any], Any, LeafInfo]] = {}

    def of(
        self,
        leaf: LeafInfo,
        *,
        shape: tuple[int, ...],
        write_shape: tuple[int, ...],
        dtype: Any,
        sharding: jax.sharding.Sharding | None,
        ext_metadata: dict[str, str] | None,
    ) -> tuple[dict[str, Any], Any]:
        """Returns TensorStore's spec of a leaf and Orbax's `ArrayMetadata` for it.

        Leaves that are alike get one spec, the same object; its path is that of the first.
        """
        is_separate = _is_separate(leaf, sharding)
        kind = _kind(leaf), shape, write_shape, dtype, is_separate, json.dumps(ext_metadata)
        if (known := self._known.get(kind)) is None:
            spec, metadata = _write_spec(
                leaf,
                info=leaf.info,
                global_shape=shape,
                local_shape=write_shape,
                dtype=dtype,
                replica_separate_folder=is_separate,
                ext_metadata=ext_metadata,
            )
            # With the leaf, for `_kind` goes by the identity of what it says.
            self._known[kind] = known = spec, metadata, leaf
        spec, metadata, _ = known
        if metadata.param_name != leaf.name:
            metadata = dataclasses.replace(metadata, param_name=leaf.name)
        return spec, metadata


def _kind(leaf: LeafInfo) -> tuple[Any, ...]:
    """What of a leaf tells how it is stored. Good as long as the leaf lives."""
    told = ((name, id(value)) for name, value in vars(leaf.info).items() if name not in _OWN)
    return id(leaf.type_handler), repr(vars(leaf.save_args)), *told


def _is_separate(leaf: LeafInfo, sharding: jax.sharding.Sharding | None) -> bool:
    type_handler = leaf.type_handler
    return (
        sharding is not None
        and leaf.info.is_ocdbt_checkpoint
        and type_handler._use_replica_parallel
        and type_handler._enable_replica_parallel_separate_folder
        and SRC["is_replicated_sharding"](sharding)
    )


def _write_spec(leaf: LeafInfo, **keywords: Any) -> tuple[dict[str, Any], Any]:
    type_handler, use_ocdbt = leaf.type_handler, leaf.info.is_ocdbt_checkpoint
    save_args = leaf.save_args
    if save_args.dtype is not None:  # Orbax wants a dtype where users may give its name.
        save_args = dataclasses.replace(save_args, dtype=jnp.dtype(save_args.dtype))
    spec = SRC["build_array_write_spec"](
        arg=save_args,
        use_ocdbt=use_ocdbt,
        process_index=SRC["process_subdir"](
            use_ocdbt, getattr(type_handler, "_override_ocdbt_process_id", None)
        ),
        metadata_key=type_handler._metadata_key,
        **keywords,
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
