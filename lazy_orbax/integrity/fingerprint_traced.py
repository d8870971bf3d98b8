"""The fingerprint of `fingerprint.py`, in a program for a device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from lazy_orbax.integrity.fingerprint import DIGIT, WORD_BYTES, high, is_small, low, u64, weights

# XLA for CPU adds up an array one number at a time. A large one is first folded so many times, with
# additions of arrays, which are quick.
_LEAST_FOLDED = 2**13
_FOLDED = 16


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


def of_traced(shard: Any, start: Any, *, folds: bool) -> Any:
    """Returns the fingerprint of a part of a leaf in a program, as a uint64.

    It is traced where 64-bit types are enabled, and reads `shard` once.

    Args:
        shard: the part, as `as_integers` returned it.
        start: where it starts in the leaf, an int64 for each axis.
        folds: whether the backend is slow at sums, but quick at additions of arrays.
    """
    if not shard.ndim:
        shard, start = shard.reshape(1), np.zeros(1, np.int64)
    start = start.astype(jnp.uint64)
    size, each = shard.shape[-1], DIGIT * WORD_BYTES // shard.dtype.itemsize
    if size <= each:
        return _of_rows_traced(shard, _weights_of_rows(shard, start), folds=folds)
    # The last axis is cut into rows of as many elements as differ in the low digit.
    whole = size // each * each
    body, rest = jnp.split(shard, [whole], axis=-1) if whole < size else (shard, None)
    total = _of_rows_traced(body, _weights_of_cut_rows(body, start, each), folds=folds)
    if rest is not None:
        moved = start + np.array([*(0 for _ in shard.shape[1:]), whole], np.uint64)
        total += of_traced(rest, moved, folds=folds)
    return total


def _weights_of_rows(shard: Any, start: Any) -> _Weights:
    words = _places_of_words(start[-1], shard.shape[-1], shard.dtype)
    every = [weights(0, place) << shift for place, shift in words]
    return _Weights(_weights_of_outer(shard, start, None), None, None, every)


def _weights_of_cut_rows(shard: Any, start: Any, each: int) -> _Weights:
    n = shard.shape[-1] // each
    first = start[-1] // u64(each) + _count(n)
    words = _places_of_words(start[-1] % u64(each), each, shard.dtype)
    carry = words[0][0] >= u64(DIGIT)
    every = [low(0, place & u64(DIGIT - 1)) << shift for place, shift in words]
    rows, next_rows = (_weights_of_outer(shard, start, first + u64(i)) for i in (0, 1))
    return _Weights(rows, next_rows, carry, every)


def _weights_of_outer(shard: Any, start: Any, digits: Any) -> Any:
    """Returns the weights of the rows: products over all axes but the last, and its high digits."""
    axes = range(shard.ndim - 1)
    along = [weights(shard.ndim - 1 - i, start[i] + _count(shard.shape[i])) for i in axes]
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


def _of_rows_traced(shard: Any, given: _Weights, *, folds: bool) -> Any:
    by = _Weights(*lax.optimization_barrier(tuple(given)))  # Else computed for each element.
    rows = shard.reshape(by.rows.size, by.words[0].size)
    if not folds or rows.size < _LEAST_FOLDED or len(rows) < _FOLDED:
        return _summed(rows, by)
    n_rows = rows.shape[0]
    height = n_rows // _FOLDED
    folded: list[Any] = [0] * len(by.words)
    for i in range(_FOLDED):
        some = slice(i * height, (i + 1) * height)
        outer = _outer(by, lambda x, some=some: x[some])
        pairs = zip(folded, _words_of(rows[some]), strict=True)
        folded = [total + word.astype(jnp.uint64) * outer for total, word in pairs]
    folded = lax.optimization_barrier(folded)  # Else each sum would do all that again.
    pairs = zip(folded, by.words, strict=True)
    total = sum(jnp.sum(jnp.sum(columns, axis=0) * last) for columns, last in pairs)
    done = _FOLDED * height
    if done == n_rows:
        return total
    next_rows = None if by.carry is None else by.next_rows[done:]
    return total + _summed(rows[done:], _Weights(by.rows[done:], next_rows, by.carry, by.words))


def _summed(rows: Any, by: _Weights) -> Any:
    words = zip(_words_of(rows), by.words, strict=True)
    by_word = sum(word.astype(jnp.uint64) * last for word, last in words)
    if by.carry is None:
        return jnp.sum(jnp.sum(by_word, axis=1) * by.rows)
    return jnp.sum(by_word * _outer(by, lambda x: x))


def _outer(by: _Weights, part_of: Any) -> Any:
    """Returns the weights of the elements of some rows, but for their place in the row."""
    rows = part_of(by.rows)[:, None]
    return rows if by.carry is None else jnp.where(by.carry, part_of(by.next_rows)[:, None], rows)


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
