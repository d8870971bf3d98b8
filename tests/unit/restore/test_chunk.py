"""A chunk that was read: compared with what was saved, cut, and cast as TensorStore casts."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from lazy_orbax.integrity import digest
from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import chunk_reads
from lazy_orbax.restore.chunk import Chunk, Target, arrived, copy

FLOATS = [
    np.dtype(dtype)
    for dtype in (
        np.float16,
        np.float32,
        np.float64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3b11fnuz,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
    )
]


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


def every_kind_of(dtype):
    """All numbers of a small dtype; of others random bits, and what lies between smaller ones."""
    if dtype.itemsize <= 2:
        return np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    rng = np.random.default_rng(0)
    found = [np.frombuffer(rng.bytes(2**16 * dtype.itemsize), dtype)]
    with np.errstate(all="ignore"):
        for smaller in (ml_dtypes.bfloat16, np.float16):
            values = every_kind_of(np.dtype(smaller)).astype(dtype)
            middles = (values[1:] + values[:-1]) / 2
            found += [values, np.nextafter(values, np.inf), middles, np.nextafter(middles, np.inf)]
    return np.concatenate(found)


@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(FLOATS, 2)], ids=str)
@pytest.mark.parametrize("with_nans", [False, True])
def test_floats_are_cast_as_tensorstore_casts(source, target, with_nans):
    values = every_kind_of(source)
    with np.errstate(all="ignore"):
        values = values if with_nans else values[~np.isnan(values)]
    found = np.empty(values.shape, target)
    for start in range(0, len(values), 2**14):  # Few enough to be cast by NumPy.
        copy(found[start : start + 2**14], values[start : start + 2**14])
    wanted = ts.cast(ts.array(values), ts.dtype(target)).read().result()
    np.testing.assert_array_equal(bits(found), bits(wanted))


@pytest.mark.parametrize(("source", "target"), [("i4", "i1"), ("f4", "i4"), ("i8", "f4")])
def test_other_numbers_are_cast_as_tensorstore_casts(source, target):
    values = np.array([-1.0, 0.0, 3.0, 100.0]).astype(source)
    found = np.empty(values.shape, target)
    copy(found, values)
    np.testing.assert_array_equal(found, digest.cast(values, np.dtype(target).name))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_a_chunk_has_beyond_the_array_is_left_out(position):
    whole = np.arange(50, dtype=np.int32)
    form = ArrayFormat("zarr", {}, (50,), (20,), whole.dtype, is_plain=True)
    target = Target(np.full(50, -1, np.int32), None)
    read = chunk_reads((50,), (20,), 4, (Box((0,), (50,)),))[position]
    mine = whole[read.box.index]
    stored = np.pad(mine, (0, 20 - len(mine)), constant_values=7).tobytes()
    chunk = Chunk("leaf", form, read, [target], digest.digest_of(mine))
    assert arrived(chunk, stored) is None
    np.testing.assert_array_equal(target.array[read.box.index], mine)
    assert np.count_nonzero(target.array == -1) == 50 - len(mine)


def test_what_was_not_saved_goes_nowhere():
    values = np.arange(8, dtype=np.float32)
    form = ArrayFormat("zarr", {}, (8,), (8,), values.dtype, is_plain=True)
    target = Target(np.zeros(8, np.float32), None)
    (read,) = chunk_reads((8,), (8,), 4, (Box((0,), (8,)),))
    chunk = Chunk("leaf", form, read, [target], digest.digest_of(values) ^ 1)
    assert arrived(chunk, values.tobytes()) == chunk.piece
    assert not target.array.any()
