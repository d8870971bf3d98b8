"""The fingerprint of `fingerprint.py`, in a program for a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from lazy_orbax.integrity.fingerprint import DIGIT, WORD_BYTES, high, is_small, low, u64, weights
from lazy_orbax.plan.shards import Shape


class _Weights(NamedTuple):
    """What the words of an array of rows are multiplied with.

    Attributes:
        rows: for each row.
        next_rows: for the elements of a row after the first whose `carry` is set, in its place.
        carry: for each element of a row, whether its high digit is one more.
        words: for each element of a row, once for each word that an element has.
    """

    rows: Any
    next_rows: Any
    carry: Any
    words: list[Any]


class Stretch(NamedTuple):
    """Some of a part's last axis.

    Attributes:
        size: how many elements of that axis.
        by: the weights of its words.
    """

    size: int
    by: _Weights


def weights_traced(shape: Shape, dtype: Any, start: Any) -> list[Stretch]:
    """Returns the weights of a part of a leaf in a program, stretch after stretch.

    It is traced where 64-bit types are enabled. Parts that look alike and start at the same place,
    of any leaves, can share them.

    Args:
        shape: the part's.
        dtype: the part's, as `as_integers` returned it.
        start: where it starts in the leaf, an int64 for each axis.
    """
    if not shape:
        shape, start = (1,), np.zeros(1, np.int64)
    start = start.astype(jnp.uint64)
    size, each = shape[-1], DIGIT * WORD_BYTES // dtype.itemsize
    if size <= each:
        return [_settled(size, _weights_of_rows(shape, dtype, start))]
    # The last axis is cut into rows of as many elements as differ in the low digit.
    whole = size // each * each
    body = (*shape[:-1], whole)
    stretches = [_settled(whole, _weights_of_cut_rows(body, dtype, start, each))]
    if whole < size:
        moved = start + np.array([*(0 for _ in shape[1:]), whole], np.uint64)
        stretches += weights_traced((*shape[:-1], size - whole), dtype, moved)
    return stretches


def of_traced(shard: Any, stretches: Sequence[Stretch]) -> Any:
    """Returns the fingerprint of a part of a leaf in a program, as a uint64.

    It is traced where 64-bit types are enabled, and reads `shard` once.

    Args:
        shard: the part, as `as_integers` returned it.
        stretches: its weights.
    """
    if not shard.ndim:
        shard = shard.reshape(1)
    total, first = u64(0), 0
    for size, by in stretches:
        end = first + size
        some = shard if size == shard.shape[-1] else lax.slice_in_dim(shard, first, end, axis=-1)
        total += _summed(some.reshape(by.rows.size, by.words[0].size), by)
        first = end
    return total


def _settled(size: int, by: _Weights) -> Stretch:
    """Makes the program compute weights once, and not again for each element."""
    return Stretch(size, _Weights(*lax.optimization_barrier(tuple(by))))


def _weights_of_rows(shape: Shape, dtype: Any, start: Any) -> _Weights:
    words = _places_of_words(start[-1], shape[-1], dtype)
    every = [weights(0, place) << shift for place, shift in words]
    return _Weights(_weights_of_outer(shape, start, None), None, None, every)


def _weights_of_cut_rows(shape: Shape, dtype: Any, start: Any, each: int) -> _Weights:
    n = shape[-1] // each
    first = start[-1] // u64(each) + _count(n)
    words = _places_of_words(start[-1] % u64(each), each, dtype)
    carry = words[0][0] >= u64(DIGIT)
    every = [low(0, place & u64(DIGIT - 1)) << shift for place, shift in words]
    rows, next_rows = (_weights_of_outer(shape, start, first + u64(i)) for i in (0, 1))
    return _Weights(rows, next_rows, carry, every)


def _weights_of_outer(shape: Shape, start: Any, digits: Any) -> Any:
    """Returns the weights of the rows: products over all axes but the last, and its high digits."""
    axes = range(len(shape) - 1)
    along = [weights(len(shape) - 1 - i, start[i] + _count(shape[i])) for i in axes]
    if digits is not None:
        along.append(high(0, digits))
    one = np.ones(1, np.uint64)  # No operation: where JAX evaluates at once, that has no mesh.
    return functools.reduce(lambda a, b: (a[:, None] * b).reshape(-1), along, one)


def _places_of_words(first: Any, n: int, dtype: Any) -> list[tuple[Any, Any]]:
    """Returns for elements in a row which words they are in, and how far up in those."""
    places = first + _count(n)
    if dtype.itemsize >= WORD_BYTES:
        n_words = dtype.itemsize // WORD_BYTES
        return [(places * u64(n_words) + u64(i), u64(0)) for i in range(n_words)]
    sharing = u64(WORD_BYTES // dtype.itemsize)
    return [(places // sharing, places % sharing * u64(8 * dtype.itemsize))]


def _count(n: int) -> Any:
    return lax.iota(jnp.uint64, n)


def _summed(rows: Any, by: _Weights) -> Any:
    words = zip(_words_of(rows), by.words, strict=True)
    by_word = sum(word.astype(jnp.uint64) * last for word, last in words)
    if by.carry is None:
        return jnp.sum(jnp.sum(by_word, axis=1) * by.rows)
    outer = jnp.where(by.carry, by.next_rows[:, None], by.rows[:, None])
    return jnp.sum(by_word * outer)


def as_integers(shard: Any) -> Any:
    """Returns an array of small floats as one of integers, of the same fingerprint.

    This comes before anything else: XLA may change the NaNs of small floats that it slices. On CPU
    it costs a copy while the program runs.
    """
    is_float = jnp.issubdtype(shard.dtype, jnp.floating)
    return _words_of(shard)[0] if is_float and shard.dtype.itemsize < WORD_BYTES else shard


def _words_of(shard: Any) -> list[Any]:
    """Returns the elements as unsigned integers: one array for each word that an element has."""
    if jnp.issubdtype(shard.dtype, jnp.complexfloating):
        return [word for half in (lax.real(shard), lax.imag(shard)) for word in _words_of(half)]
    if shard.dtype == jnp.bool_:
        return [shard.astype(jnp.uint8)]
    if is_small(shard.dtype):
        if jnp.issubdtype(shard.dtype, jnp.floating):
            return [lax.bitcast_convert_type(shard, jnp.uint4).astype(jnp.uint8)]
        shard = shard.astype(jnp.int8)
    bits = lax.bitcast_convert_type(shard, np.dtype(f"u{shard.dtype.itemsize}"))
    return [bits] if bits.dtype.itemsize < 8 else [bits & u64(2**32 - 1), bits >> u64(32)]
