"""Digests: XXH3, 64 bit, of the elements of an array in C order."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import xxhash

from lazy_orbax.plan.boxes import parts

# A piece that is not contiguous is made so in parts of this size.
_PART_BYTES = 2**24


@functools.cache
def _carriers() -> dict[Any, Any]:
    """Returns what carries dtypes with less than a byte each: only the low bits are stored."""
    import tensorstore as ts  # It takes a moment to import, and digests of bytes need none.

    return {ts.dtype(name).numpy_dtype: np.int8 for name in ("int2", "int4") if hasattr(ts, name)}


def digest_of(array: np.ndarray) -> int:
    """Returns the digest (XXH3, 64 bit) of the elements of an array, in C order.

    Args:
        array: of any shape and any dtype that is stored. Contiguous memory is not copied.
    """
    if (carrier := _carriers().get(array.dtype)) is not None:
        array = array.astype(carrier)
    if array.flags.c_contiguous:
        return digest_of_bytes(array.reshape(-1).view(np.uint8))
    hasher = xxhash.xxh3_64()
    for box in parts(array.shape, array.dtype.itemsize, _PART_BYTES):
        hasher.update(bytes_of(array[box.index]).data)
    return hasher.intdigest()


def digest_of_bytes(content: bytes | memoryview | np.ndarray, *, seed: int = 0) -> int:
    """Returns the digest of bytes.

    Args:
        content: contiguous bytes.
        seed: the digest of what came before, if anything did.
    """
    return xxhash.xxh3_64_intdigest(content, seed=seed)  # type: ignore[arg-type]


def digest_of_text(text: str) -> int:
    """Returns the digest of a string in UTF-8."""
    return digest_of_bytes(text.encode("utf-8", "surrogatepass"))


def hasher() -> Any:
    """Returns what computes the digest of bytes that come in parts."""
    return xxhash.xxh3_64()


def bytes_of(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of which `digest_of` is the digest."""
    if (carrier := _carriers().get(array.dtype)) is not None:
        array = array.astype(carrier)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns an array as TensorStore casts it where it writes or reads."""
    if array.dtype.name == dtype:
        return array
    import tensorstore as ts

    return ts.cast(ts.array(array), ts.dtype(dtype)).read().result()
