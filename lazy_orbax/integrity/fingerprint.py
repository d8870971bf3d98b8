"""A fingerprint of a part of a leaf: what it is, and how the host computes it.

**The function.** A leaf is a row of 32-bit words `x`: four bytes of its last axis, little-endian,
counted from the start of that axis in the whole leaf. An element of 8 or 16 bytes is two or four
words; four or two elements of 1 or 2 bytes share one. Elements of less than a byte take a byte
here. The fingerprint of any part of the leaf is

    sum over its words of  x * W,  modulo 2**64,   W = product over the axes of w(axis, coordinate)

where a coordinate is a place in the whole leaf and w is a pseudo-random odd number of 64 bits. A
word that a part has only some bytes of counts as if the others were zero.

**What follows.** The sum is over words, so the fingerprints of parts that do not overlap add up to
that of what they cover, whatever the shards, slabs, replicas and processes were. Integers modulo
2**64 have no rounding and no overflow: every order of summation gives the same bits, so the host
and each backend may take the order that suits it.

**What is found.** One changed word, for sure: W is odd, so (x - x') * W is not zero. Two unequal
words that changed places, unless (x - x') * (W - W') is zero: that takes 33 zero bits at the end
of W - W' where they differ in the sign bit alone, and more elsewhere. For a change that does not
know the weights the odds are about 2**-32 an axis in the worst case, and 2**-64 in most. It is no
protection against those who can compute the weights: neither is it meant as one.

**Why not fewer bits.** Modulo 2**32, a swap of x and -x, which differ in one bit, is never found:
2**31 times an even number is zero.

Coordinates are 64-bit integers, so leaves of more than 2**31 elements are like others. Nothing
here is shared with `pack` and `plan`, because it tells whether they are right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

WORD_BYTES = 4
# A coordinate is two digits in this base, each with a weight.
DIGIT_BITS = 12
DIGIT = 2**DIGIT_BITS
# What the host multiplies at once fits a core's cache, and what it copies is bounded.
_BLOCK_WORDS = 2**15
_PART_BYTES = 2**22
_MOST_ROWS = 2**16
_SHORT_ROW_WORDS = 128


def u64(number: int) -> np.uint64:
    """Returns a constant for arithmetic modulo 2**64."""
    return np.uint64(number)


def _odd(number: Any) -> Any:
    """Returns pseudo-random odd numbers: SplitMix64's finalizer, of NumPy's or JAX's uint64."""
    mixed = number * u64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> u64(27))) * u64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> u64(31))) | u64(1)


def high(axis: int, digit: Any) -> Any:
    """Returns the weights of the high digits of coordinates."""
    return _odd((digit << u64(8)) + u64(2 * axis + 1))


def low(axis: int, digit: Any) -> Any:
    """Returns the weights of the low digits of coordinates."""
    return _odd((digit << u64(8)) + u64(2 * axis + 2))


def weights(axis: int, coordinates: Any) -> Any:
    """Returns the weights of coordinates along an axis.

    Args:
        axis: counted from the last, which is 0 and whose coordinates are of words.
        coordinates: uint64, an array of NumPy or, where 64-bit types are enabled, of JAX.
    """
    low_digits = coordinates & u64(DIGIT - 1)
    return high(axis, coordinates >> u64(DIGIT_BITS)) * low(axis, low_digits)


def of_host(array: np.ndarray, start: Sequence[int]) -> int:
    """Returns the fingerprint of a part of a leaf that is in host memory.

    Args:
        array: the part, of any dtype that is stored. Contiguous memory is not copied.
        start: where it starts in the leaf.
    """
    if is_small(array.dtype):  # NumPy gives each a byte; of an integer's, the sign fills the rest.
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        array = array.view(np.uint8) if is_float else array.astype(np.int8)
    if not array.ndim:
        array, start = array.reshape(1), (0,)
    if not array.size:
        return 0
    itemsize, n_rows = array.dtype.itemsize, math.prod(array.shape[:-1])
    before, row_bytes = start[-1] * itemsize % WORD_BYTES, array.shape[-1] * itemsize
    is_plain = array.flags.c_contiguous and array.dtype.isnative
    is_whole = is_plain and not before and not row_bytes % WORD_BYTES
    if n_rows > _MOST_ROWS or (not is_whole and array.nbytes > _PART_BYTES):
        return _of_halves(array, tuple(start))
    native = array.dtype.newbyteorder("=")  # What is stored tells no byte order.
    rows = np.ascontiguousarray(array, native).reshape(n_rows, -1).view(np.uint8)
    if not is_whole:
        after = -(before + row_bytes) % WORD_BYTES
        rows = np.pad(rows, ((0, 0), (before, after)))
    found = _of_rows(rows.view("<u4"), array.shape[:-1], start[:-1], start[-1] * itemsize)
    return found


@functools.lru_cache(maxsize=256)
def is_small(dtype: Any) -> bool:
    """Whether elements of a dtype have less than a byte each."""
    if dtype == np.bool_ or jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return info(dtype).bits < 8


def _of_halves(array: np.ndarray, start: tuple[int, ...]) -> int:
    axis = next(axis for axis, size in enumerate(array.shape) if size > 1)
    half = array.shape[axis] // 2
    first, second = np.split(array, [half], axis)
    moved = (*start[:axis], start[axis] + half, *start[axis + 1 :])
    return (of_host(first, start) + of_host(second, moved)) % 2**64


def _of_rows(
    words: np.ndarray, shape: Sequence[int], start: Sequence[int], start_bytes: int
) -> int:
    """Returns the sum over words that are contiguous, one row for each place of the outer axes."""
    n_rows, n_words = words.shape
    by_row = _row_weights(tuple(shape), tuple(start))
    total = np.zeros(1, np.uint64)
    products = np.empty(min(_BLOCK_WORDS, words.size), np.uint64)
    for column in range(0, n_words, _BLOCK_WORDS):
        width = min(_BLOCK_WORDS, n_words - column)
        by_word = _word_weights(start_bytes // WORD_BYTES + column, width)
        height = _BLOCK_WORDS // width
        flat = width <= _SHORT_ROW_WORDS
        if flat:  # Row by row, NumPy would take longer to begin than to end.
            by_word = np.tile(by_word, min(height, n_rows))
        for row in range(0, n_rows, height):
            block = words[row : row + height, column : column + width]
            outer = by_row[row : row + height]
            if flat:
                out = products[: block.size]
                np.multiply(by_word[: block.size], np.repeat(outer, width), out=out)
                np.multiply(out, block.reshape(-1), out=out)
                total += out.sum()
            else:
                out = products[: block.size].reshape(block.shape)
                np.multiply(block, by_word, out=out)
                total += (out.sum(axis=1) * outer).sum()
    return int(total[0])


# What follows are small tables of which the pieces of a save need the same ones again and again.
@functools.lru_cache(maxsize=16)
def _row_weights(shape: tuple[int, ...], start: tuple[int, ...]) -> np.ndarray:
    by_row = np.ones(1, np.uint64)
    for axis, (first, size) in enumerate(zip(start, shape, strict=True)):
        along = weights(len(shape) - axis, np.arange(first, first + size, dtype=np.uint64))
        by_row = np.multiply.outer(by_row, along).reshape(-1)
    return by_row


@functools.lru_cache(maxsize=16)
def _word_weights(first: int, n_words: int) -> np.ndarray:
    """Returns `weights(0, ...)` of words that follow each other, at the cost of a product each."""
    before = first % DIGIT
    digits = np.arange(first >> DIGIT_BITS, (first + n_words - 1 >> DIGIT_BITS) + 1, dtype="u8")
    every = np.multiply.outer(high(0, digits), _low_table())
    return every.reshape(-1)[before : before + n_words]


@functools.cache
def _low_table() -> np.ndarray:
    return low(0, np.arange(DIGIT, dtype=np.uint64))
