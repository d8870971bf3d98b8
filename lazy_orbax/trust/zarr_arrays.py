"""What a stored array declares: sizes that are allocated before a byte of data is looked at."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust.bounded_json import MOST_DIMENSIONS, parse_json
from lazy_orbax.trust.files import brief

# Metadata of one array; Orbax's takes some hundred bytes.
MOST_METADATA_BYTES = 2**20
_LONGEST_DIMENSION = 2**62
# Those that allocate no more than the chunk's declared size. Blosc allocates what the chunk says.
_COMPRESSORS = ("zstd", "gzip", "zlib", "bz2")
_CODECS = ("zstd", "gzip", "bytes", "transpose", "crc32c", "sharding_indexed")
_WIDEST_ITEM_BYTES = 16
_NUMERIC = re.compile(r"[<>|]?[biufc](\d{1,2})")


@dataclasses.dataclass(frozen=True)
class Declared:
    """The sizes that an array declares.

    Attributes:
        shape: of the array.
        total_bytes: of all its elements.
        chunk_bytes: of one chunk, decoded.
        chunks: how many there are.
    """

    shape: tuple[int, ...]
    total_bytes: int
    chunk_bytes: int
    chunks: int


def declared(content: bytes, where: Any) -> Declared:
    """Returns the sizes that `.zarray` or `zarr.json` declares.

    Args:
        content: of the file.
        where: its path, for errors.

    Raises:
        MalformedCheckpointError: it is not what a Zarr array of numbers is described by.
    """
    metadata = parse_json(content, where)
    try:
        is_v3 = metadata.get("zarr_format") == 3
        shape, chunk, smallest, dtype = _parts_of_v3(metadata) if is_v3 else _parts_of_v2(metadata)
        for one in (shape, chunk, smallest):
            if len(one) != len(shape):
                raise _Unfit(f"chunks {brief(one)}", f"{len(shape)} dimensions, as in shape")
        for size, most in zip(chunk, shape):
            if size > max(most, 1):
                raise _Unfit(f"chunks {brief(chunk)}", f"chunks within the shape {brief(shape)}")
        item_bytes = _item_bytes(dtype)
    except _Unfit as unfit:
        raise MalformedCheckpointError(where, *unfit.args) from None
    chunks = math.prod(-(-size // part) for size, part in zip(shape, smallest))
    return Declared(
        tuple(shape), math.prod(shape) * item_bytes, math.prod(chunk) * item_bytes, chunks
    )


def declared_by_all(
    contents: Iterable[tuple[str, bytes]], where: Callable[[str], str]
) -> dict[str, Declared]:
    """Returns what every array declares, by its name.

    Args:
        contents: of `name/.zarray` or `name/zarr.json`, or of both, with that path.
        where: what to call such a path in an error.

    Raises:
        MalformedCheckpointError: one is not what a Zarr array of numbers is described by.
    """
    found: dict[str, Declared] = {}
    alike: dict[bytes, Declared] = {}  # Most arrays of a model are like others.
    for path, content in contents:
        if (one := alike.get(content)) is None:
            one = alike[content] = declared(content, where(path))
        name = path.rpartition("/")[0]
        # Which of two is read depends on the handler: the larger counts.
        if name not in found or one.total_bytes > found[name].total_bytes:
            found[name] = one
    return found


class _Unfit(Exception):
    """What was found, and what was wanted."""


def _parts_of_v2(metadata: dict[str, Any]) -> tuple[list[int], list[int], list[int], Any]:
    if metadata.get("filters"):
        raise _Unfit(f"filters {brief(metadata['filters'])}", "no filters")
    compressor = metadata.get("compressor")
    if compressor is not None:
        kind = compressor.get("id") if isinstance(compressor, dict) else compressor
        if kind not in _COMPRESSORS:
            raise _Unfit(f"compressor {brief(kind)}", f"none or one of {', '.join(_COMPRESSORS)}")
    chunk = _sizes(metadata.get("chunks"), "chunks", 1)
    return _sizes(metadata.get("shape"), "shape", 0), chunk, chunk, metadata.get("dtype")


def _parts_of_v3(metadata: dict[str, Any]) -> tuple[list[int], list[int], list[int], Any]:
    grid = _object(_object(metadata, "chunk_grid"), "configuration")
    chunk = smallest = _sizes(grid.get("chunk_shape"), "chunk_shape", 1)
    for kind, configuration in _codecs(metadata.get("codecs")):
        if kind == "sharding_indexed":
            smallest = _sizes(configuration.get("chunk_shape"), "chunk_shape of sharding", 1)
            inner = [
                *_codecs(configuration.get("codecs")),
                *_codecs(configuration.get("index_codecs", [])),
            ]
            if any(kind == "sharding_indexed" for kind, _ in inner):
                raise _Unfit("shards within shards", "one level of shards")
    return _sizes(metadata.get("shape"), "shape", 0), chunk, smallest, metadata.get("data_type")


def _codecs(value: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list):
        raise _Unfit(f"codecs {brief(value)}", "a list of codecs")
    found = []
    for codec in value:
        kind = codec.get("name") if isinstance(codec, dict) else codec
        if kind not in _CODECS:
            raise _Unfit(f"codec {brief(kind)}", f"one of {', '.join(_CODECS)}")
        found.append((kind, _object(codec, "configuration", {})))
    return found


def _object(value: Any, name: str, default: Any = None) -> dict[str, Any]:
    inner = value.get(name, default) if isinstance(value, dict) else default
    if not isinstance(inner, dict):
        raise _Unfit(f"{name} {brief(inner)}", "a JSON object")
    return inner


def _sizes(value: Any, name: str, least: int) -> list[int]:
    if not (isinstance(value, list) and len(value) <= MOST_DIMENSIONS):
        raise _Unfit(f"{name} {brief(value)}", f"a list of at most {MOST_DIMENSIONS} sizes")
    if not all(type(size) is int and least <= size < _LONGEST_DIMENSION for size in value):
        raise _Unfit(f"{name} {brief(value)}", f"whole numbers from {least} to {2**62 - 1}")
    return value


def _item_bytes(dtype: Any) -> int:
    """Returns at least the size of an element, for every dtype that Orbax stores."""
    if not isinstance(dtype, str):
        raise _Unfit(f"dtype {brief(dtype)}", "a number's dtype: no structures, no objects")
    if dtype == "bool":
        return 1
    if match := re.fullmatch(_NUMERIC, dtype):  # Zarr v2: "<f4", in bytes.
        item_bytes = int(match[1])
    elif match := re.match(r"(?:bfloat|float|u?int|complex)(\d{1,3})", dtype):  # In bits.
        item_bytes = -(-int(match[1]) // 8)
    else:
        raise _Unfit(f"dtype {brief(dtype)}", "a number's dtype: no structures, no objects")
    if not 1 <= item_bytes <= _WIDEST_ITEM_BYTES:
        raise _Unfit(f"dtype {brief(dtype)}", f"at most {_WIDEST_ITEM_BYTES} bytes an element")
    return item_bytes
