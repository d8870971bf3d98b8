"""A chunk that was read: is it what was saved, and where does what is wanted of it go?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from lazy_orbax.integrity import digest
from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.reads import ChunkRead, Index
from lazy_orbax.restore.rounding import round_to

# What NumPy casts sooner than TensorStore, which takes some 80 us for anything.
_SHORT_BYTES = 2**19


class Target(NamedTuple):
    """Where a wanted box goes.

    Attributes:
        array: of the box's shape, in the dtype that is wanted.
        memory: the same as bytes, where it is one piece of memory in the dtype that is stored.
        rounds_once: whether float64 is rounded to the nearest value of the dtype. Else it is cast
            as TensorStore does, by way of float32.
    """

    array: np.ndarray
    memory: memoryview | None
    rounds_once: bool = False


class Chunk(NamedTuple):
    """A chunk that is to be read.

    Attributes:
        leaf: the leaf it is of.
        format: how that is stored.
        read: which chunk, and what of it goes where.
        targets: the wanted boxes.
        digest: what it should be; `None` where nobody knows, or it is looked at later.
    """

    leaf: str
    format: ArrayFormat
    read: ChunkRead
    targets: Sequence[Target]
    digest: int | None

    @property
    def piece(self) -> Piece:
        """What was saved there, where there is a digest of it."""
        assert self.digest is not None
        return Piece(self.leaf, self.read.box, self.digest)

    @property
    def places(self) -> list[memoryview]:
        """The memory to which its bytes go as they are, one part after the other; else none."""
        found = []
        for wanted, offset, n_bytes in self.read.spans:
            memory = self.targets[wanted].memory
            if memory is None:
                return []
            found.append(memory[offset : offset + n_bytes])
        return found

    def is_other(self, data: np.ndarray) -> bool:
        """Whether this, in the dtype that is stored, is known not to be what was saved."""
        return self.digest is not None and digest.digest_of(data) != self.digest


def arrived_in_place(chunk: Chunk, places: Sequence[memoryview]) -> Piece | None:
    """Looks at the bytes of a chunk that are where they go.

    Args:
        chunk: what they are of.
        places: where they are, one part after the other.
    """
    if chunk.digest is None:
        return None
    if len(places) == 1:
        return chunk.piece if digest.digest_of_bytes(places[0]) != chunk.digest else None
    hasher = digest.hasher()
    for place in places:
        hasher.update(place)
    return chunk.piece if hasher.intdigest() != chunk.digest else None


def arrived(chunk: Chunk, memory: Any) -> Piece | None:
    """Looks at the bytes of a chunk, and puts them in their places.

    Args:
        chunk: what they are of.
        memory: the bytes.
    """
    form, read = chunk.format, chunk.read
    is_whole = read.box.shape == form.chunk
    if is_whole and chunk.digest is not None and digest.digest_of_bytes(memory) != chunk.digest:
        return chunk.piece
    data = np.frombuffer(memory, np.uint8).view(form.dtype).reshape(form.chunk)
    if not is_whole:
        data = data[tuple(slice(n) for n in read.box.shape)]
    return scatter(chunk, data, is_checked=is_whole)


def scatter(chunk: Chunk, data: np.ndarray, *, is_checked: bool) -> Piece | None:
    """Puts what is wanted of a chunk in its places, if it is what was saved.

    Args:
        chunk: the chunk.
        data: what of the array is in it, in the dtype that is stored.
        is_checked: whether its digest is known to be right.
    """
    if not is_checked and chunk.is_other(data):
        return chunk.piece
    for one in chunk.read.placed:
        put(chunk.targets[one.wanted], one.target, data[(*one.source, ...)])
    return None


def put(target: Target, index: Index, data: np.ndarray) -> None:
    """Copies an array into a part of a target."""
    copy(target.array[(*index, ...)], data, rounds_once=target.rounds_once)


def copy(target: np.ndarray, data: np.ndarray, *, rounds_once: bool = False) -> None:
    """Copies an array into another one, and casts it as TensorStore does where it reads."""
    if target.dtype == data.dtype:
        np.copyto(target, data)
    elif rounds_once and data.dtype == np.float64 and _is_float(target.dtype):
        round_to(target, data)
    elif not _cast_by_numpy(target, data):
        ts.array(target).write(ts.cast(ts.array(data), ts.dtype(target.dtype))).result()


@np.errstate(all="ignore")
def _cast_by_numpy(target: np.ndarray, data: np.ndarray) -> bool:
    """Casts a few floats, unless NumPy and TensorStore differ: in NaNs, and in rounding float64."""
    are_floats = _is_float(target.dtype) and _is_float(data.dtype) and data.dtype.itemsize <= 4
    if not are_floats or data.nbytes > _SHORT_BYTES or np.isnan(data).any():
        return False
    np.copyto(target, data, casting="unsafe")
    return True


@functools.lru_cache(maxsize=64)
def _is_float(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, np.floating)


def check_tail(chunk: Chunk, tail: bytearray) -> None:
    """Checks what follows the elements of a chunk.

    Raises:
        ValueError: it is something else.
    """
    if tail != chunk.format.tail:
        raise ValueError(
            f"leaf {chunk.leaf}, chunk {list(chunk.read.position)}: found an index "
            f"{bytes(tail)!r}, wanted {chunk.format.tail!r}"
        )
