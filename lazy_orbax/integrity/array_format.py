"""How a stored array is cut into chunks, and whether a chunk is stored as it lies in memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from typing import Any

import numpy as np
import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.plan.boxes import Shape
from lazy_orbax.trust.contents import Contents

# They have less than a byte an element, or not every byte is one.
_ENCODED_DTYPES = frozenset({"bool", "int2", "int4", "uint2", "uint4"})
_NOT_NUMERIC = frozenset({"byte", "char", "json", "string", "ustring"})
_MEMBERS_OF_V2 = frozenset(
    ("chunks", "compressor", "dimension_separator", "dtype", "fill_value", "filters", "order")
) | {"shape", "zarr_format"}
_SHARDING = frozenset(("chunk_shape", "codecs", "index_codecs"))
# Behind the only chunk of a Zarr v3 shard: where it starts, its length, and a checksum of these.
_INDEX_BYTES = 20


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayFormat:
    """What the metadata of an array says of its chunks.

    Attributes:
        driver: TensorStore's name of the format, `zarr` or `zarr3`.
        metadata: the metadata itself, as JSON values.
        shape: of the array.
        chunk: shape of its chunks.
        dtype: of its elements.
        is_plain: whether the elements of a chunk are stored as they lie in memory, in C order.
        tail: what follows them then.
    """

    driver: str
    metadata: dict[str, Any]
    shape: Shape
    chunk: Shape
    dtype: np.dtype
    is_plain: bool
    tail: bytes = b""

    @functools.cached_property
    def chunk_bytes(self) -> int:
        """Size of a chunk in memory, in bytes."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def key(self, position: Shape) -> str:
        """Returns the key of a chunk below the array's own."""
        if self.driver == "zarr":
            separator, first = self.metadata.get("dimension_separator", "."), []
        else:
            encoding = self.metadata["chunk_key_encoding"]
            is_v2 = encoding["name"] == "v2"
            default = "." if is_v2 else "/"
            separator = encoding.get("configuration", {}).get("separator", default)
            first = [] if is_v2 else ["c"]
        return separator.join([*first, *map(str, position)]) or "0"


@functools.lru_cache(maxsize=4096)
def format_of(content: bytes, *, zarr3: bool) -> ArrayFormat:
    """Returns what the metadata of an array says, which was checked to be that.

    Args:
        content: of `.zarray` or `zarr.json`.
        zarr3: whether it is the latter.

    Raises:
        ValueError: it is of no dtype that TensorStore knows, or has an unknown form.
    """
    try:
        found = _format_of(json.loads(content), zarr3=zarr3)
        _refuse_invalid(content, zarr3=zarr3)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"an array of an unknown form ({error!r})") from error
    return found


def _format_of(found: Any, *, zarr3: bool) -> ArrayFormat:
    if not zarr3:
        if unknown := found.keys() - _MEMBERS_OF_V2:  # TensorStore would overlook them.
            raise ValueError(f"unknown members {sorted(unknown)}")
        dtype = _dtype_of_v2(found["dtype"])
        plain = found["order"] == "C" and not found.get("filters") and found["compressor"] is None
        plain = plain and dtype.byteorder != ">"
        return _format("zarr", found, found["chunks"], dtype, is_plain=plain, tail=b"")
    dtype = ts.dtype(found["data_type"]).numpy_dtype
    chunk = found["chunk_grid"]["configuration"]["chunk_shape"]
    tail = _tail(found["codecs"], chunk, dtype)
    return _format("zarr3", found, chunk, dtype, is_plain=tail is not None, tail=tail or b"")


def _refuse_invalid(content: bytes, *, zarr3: bool) -> None:
    """Lets TensorStore look at metadata, which takes no more than what it knows.

    Raises:
        ValueError: it would not open such an array.
    """
    store = ts.KvStore.open({"driver": "memory"}, context=ts.Context()).result()
    store[_paths.ZARR_V3 if zarr3 else _paths.ZARR_V2] = content
    driver = "zarr3" if zarr3 else "zarr"
    ts.open({"driver": driver}, kvstore=store, open=True, read=True).result()


def formats_of(contents: Contents) -> dict[str, ArrayFormat]:
    """Returns how each array of an item is stored, by its leaf.

    Raises:
        ValueError: see `format_of`. The message names the file.
    """
    zarr3 = contents.tree is not None and bool(contents.tree.use_zarr3)
    end = f"/{_paths.ZARR_V3 if zarr3 else _paths.ZARR_V2}"
    found = {}
    for path, content in contents.descriptions.items():
        if path.endswith(end):
            try:
                found[path[: -len(end)]] = format_of(content, zarr3=zarr3)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    return found


def _format(
    driver: str, found: dict[str, Any], chunk: Any, dtype: np.dtype, *, is_plain: bool, tail: bytes
) -> ArrayFormat:
    is_plain = is_plain and dtype.name not in _ENCODED_DTYPES
    shape = tuple(found["shape"])
    form = ArrayFormat(driver, found, shape, tuple(chunk), native(dtype), is_plain, tail)
    form.key((0,) * len(shape))  # It raises if keys cannot be made.
    return form


def native(dtype: Any) -> np.dtype:
    """Returns a dtype in this machine's byte order, in which TensorStore and JAX have all data."""
    return np.dtype(dtype).newbyteorder("=")


@functools.lru_cache(maxsize=256)
def is_numeric(dtype: np.dtype) -> bool:
    """Whether TensorStore has such elements, and they are numbers or booleans."""
    try:
        return ts.dtype(dtype).name not in _NOT_NUMERIC
    except (TypeError, ValueError):
        return False


def _dtype_of_v2(name: str) -> np.dtype:
    return np.dtype(name) if name[0] in "<>|" else ts.dtype(name).numpy_dtype


def _tail(codecs: list[Any], chunk: list[int], dtype: np.dtype) -> bytes | None:
    """Returns what follows the elements of a chunk; `None` if they are encoded in some way."""
    if len(codecs) != 1:
        return None
    (codec,) = codecs
    if codec.keys() - {"name", "configuration"}:
        return None
    if _is_little(codec):
        return b""
    inner = codec.get("configuration", {})
    is_one = codec.get("name") == "sharding_indexed" and inner.get("chunk_shape") == chunk
    at_end = inner.get("index_location", "end") == "end"
    index = inner.get("index_codecs", ())
    # Of others, and of what is misspelt, TensorStore judges.
    is_one = is_one and not inner.keys() - _SHARDING - {"index_location"}
    is_one = is_one and len(index) == 2 and _is_little(index[0]) and _is_checksum(index[1])
    simple = len(inner.get("codecs", ())) == 1 and _is_little(inner["codecs"][0])
    if not (is_one and at_end and simple):
        return None
    fields = struct.pack("<QQ", 0, math.prod(chunk) * dtype.itemsize)
    return fields + struct.pack("<I", _crc32c(fields))


def _is_little(codec: dict[str, Any]) -> bool:
    settings = codec.get("configuration", {})
    is_known = not codec.keys() - {"name", "configuration"} and not settings.keys() - {"endian"}
    return is_known and codec["name"] == "bytes" and settings.get("endian", "little") == "little"


def _is_checksum(codec: dict[str, Any]) -> bool:
    return codec.get("name") == "crc32c" and not codec.get("configuration")


def _crc32c(data: bytes) -> int:
    """Returns the checksum of a few bytes (Castagnoli, as in RFC 3720)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
