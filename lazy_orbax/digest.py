"""Digests: XXH3, 64 bit, of the elements of an array in C order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
import xxhash

from lazy_orbax.layout import Shape, index_of

# A piece that is not contiguous is made so in parts of this size.
_PART_BYTES = 2**24
# They have less than a byte each, of which only the low bits are stored.
_CARRIERS = {ts.dtype(name).numpy_dtype: np.int8 for name in ("int2", "int4") if hasattr(ts, name)}


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a leaf.

    Attributes:
        start: where it starts in the global array.
        shape: its shape.
    """

    start: Shape
    shape: Shape

    @property
    def index(self) -> tuple[slice, ...]:
        """The rectangle as an index into the global array."""
        return index_of(self.start, self.shape)

    def __str__(self) -> str:
        return f"[{', '.join(f'{part.start}:{part.stop}' for part in self.index)}]"


def digest_of(array: np.ndarray) -> int:
    """Returns the digest (XXH3, 64 bit) of the elements of an array, in C order.

    Args:
        array: of any shape and any dtype that is stored. Contiguous memory is not copied.
    """
    if array.dtype in _CARRIERS:
        array = array.astype(_CARRIERS[array.dtype])
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
    if array.dtype in _CARRIERS:
        array = array.astype(_CARRIERS[array.dtype])
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def parts(
    shape: Shape, itemsize: int, limit_bytes: int, chunk: Shape | None = None
) -> Iterator[Box]:
    """Cuts an array into boxes of at most `limit_bytes` that follow each other in C order.

    Args:
        shape: the array's shape.
        itemsize: bytes of one element.
        limit_bytes: most bytes of a box, unless one element has more.
        chunk: shape of the chunks in which it is stored. Boxes are cut between chunks, where rows
            of whole chunks do not take more than four times the limit.
    """
    axis = 0
    while axis < len(shape) and math.prod(shape[axis + 1 :]) * itemsize > limit_bytes:
        axis += 1
    if axis == len(shape):
        if not shape:
            yield Box((), ())
            return
        axis -= 1
    row_bytes = max(1, math.prod(shape[axis + 1 :]) * itemsize)
    rows = max(1, limit_bytes // row_bytes)
    if chunk and math.prod(shape[1:]) * itemsize * chunk[0] <= 4 * limit_bytes:
        axis, row_bytes = 0, math.prod(shape[1:]) * itemsize
        rows = max(1, limit_bytes // row_bytes // chunk[0]) * chunk[0]
    for outer in np.ndindex(*shape[:axis]):
        for row in range(0, shape[axis], rows):
            start = (*outer, row, *(0 for _ in shape[axis + 1 :]))
            n_rows = min(rows, shape[axis] - row)
            yield Box(start, (*(1 for _ in outer), n_rows, *shape[axis + 1 :]))


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns an array as TensorStore casts it where it writes or reads."""
    if array.dtype.name == dtype:
        return array
    return ts.cast(ts.array(array), ts.dtype(dtype)).read().result()
