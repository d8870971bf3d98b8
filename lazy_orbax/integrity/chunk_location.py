"""Which file holds a chunk: asked only when something is wrong with it."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from lazy_orbax.plan.boxes import Box, Shape

_OTHER_DTYPES = ("int2", "int4", "uint2", "uint4", "bool", "string", "json")
# Of a Zarr v3 shard with one chunk: its offset and size, and a checksum of these.
_INDEX_BYTES = 20
MOST_KEYS = 1000


def chunk_shape(store: ts.TensorStore) -> Shape:
    """Returns the shape of what is stored under one key."""
    return tuple(n or 1 for n in store.chunk_layout.write_chunk.shape or ())


def chunk_keys(store: ts.TensorStore, box: Box) -> list[str]:
    """Returns the keys, below the array's own, of the chunks that a box touches.

    Args:
        store: an open array of driver `zarr` or `zarr3`.
        box: a box of it.
    """
    return keys_of(store.spec().to_json()["metadata"], chunk_shape(store), box)


def keys_of(metadata: Mapping[str, Any], chunk: Shape, box: Box) -> list[str]:
    """Returns the same, at most 1000, of what describes an array.

    Args:
        metadata: of either version of Zarr, as JSON values.
        chunk: shape of the chunks.
        box: a box of the array.
    """
    ranges = [
        range(a // c, (a + n - 1) // c + 1)
        for a, n, c in zip(box.start, box.shape, chunk, strict=True)
    ]
    if "chunk_key_encoding" in metadata:
        encoding = metadata["chunk_key_encoding"]
        is_v2 = encoding["name"] == "v2"
        separator = encoding.get("configuration", {}).get("separator", "." if is_v2 else "/")
        first = [] if is_v2 else ["c"]
    else:
        separator, first = metadata.get("dimension_separator", "."), []
    keys = itertools.islice(itertools.product(*ranges), MOST_KEYS)
    return [separator.join([*first, *map(str, key)]) or "0" for key in keys]


def plain_bytes(store: ts.TensorStore, key: str) -> slice | None:
    """Returns where in the value of a chunk its elements are, in C order and as they are in memory.

    `None` where they are encoded in some other way. The range may have no end: up to the last byte.

    Args:
        store: an open array of driver `zarr` or `zarr3`.
        key: a chunk's key.
    """
    metadata = store.spec().to_json()["metadata"]
    if store.dtype.name in _OTHER_DTYPES or store.kvstore is None:
        return None
    if "codecs" not in metadata:
        simple = metadata["order"] == "C" and not metadata.get("filters")
        dtype = metadata["dtype"]
        little = isinstance(dtype, str) and dtype[0] != ">"
        return slice(0, None) if simple and little and metadata["compressor"] is None else None
    codec, *more = metadata["codecs"]
    if codec.get("name") == "sharding_indexed" and not more:
        inner = codec["configuration"]
        is_one = tuple(inner["chunk_shape"]) == chunk_shape(store)
        if not is_one or inner.get("index_location", "end") != "end":
            return None
        if any(not _is_little(codec) for codec in inner["codecs"]):
            return None
        found = store.kvstore.read(key, byte_range=slice(-_INDEX_BYTES, None)).result()
        if found.state != "value":
            return slice(0, None)
        start, n_bytes = struct.unpack("<QQ", found.value[:16])
        return slice(start, start + n_bytes)
    return slice(0, None) if _is_little(codec) and not more else None


def _is_little(codec: dict[str, Any]) -> bool:
    endian = codec.get("configuration", {}).get("endian", "little")
    return codec.get("name") == "bytes" and endian == "little"


def file_of(base: ts.KvStore, key: str, context: ts.Context) -> str | None:
    """Returns the file of an OCDBT database that holds the value of a key, and where in it.

    Args:
        base: the directory of the database.
        key: a key in the database.
        context: TensorStore's.
    """
    manifest = ts.ocdbt.dump(base, context=context).result()
    if not manifest["versions"]:
        return None
    node, path = manifest["versions"][-1]["root"], ""
    wanted = key.encode()
    while "location" in node:
        location = node["location"]
        listed = ts.ocdbt.dump(base, location, context=context).result()
        found = _entry(listed, wanted)
        if found is None:
            return None
        wanted, entry = found
        if listed["height"] == 0:
            path = entry.get("indirect_value", location)
            break
        node = entry
    return _place(path)


def _entry(node: dict[str, Any], key: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """Returns the entry of a B-tree node under which a key is, and what is left of the key."""
    if node["height"] == 0:
        return next(((key, entry) for entry in node["entries"] if entry["key"] == key), None)
    before = [entry for entry in node["entries"] if entry["key"] <= key]
    if not before:
        return None
    return key[len(before[-1].get("subtree_common_prefix", b"")) :], before[-1]


def _place(location: str) -> str | None:
    """Turns `value:ocdbt.process_0/:d/name:12:34` into words."""
    kind, _, rest = location.partition(":")
    file, _, extent = rest.rpartition(":")
    file, _, offset = file.rpartition(":")
    if not kind or not file:
        return None
    return f"{file.replace(':', '')} (bytes {offset} to {int(offset) + int(extent)})"
