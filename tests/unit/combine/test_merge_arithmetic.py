"""Sums against NumPy, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from equipment.trees import random_array

from lazy_orbax.combine.merge_arithmetic import add, combine
from lazy_orbax.restore.rounding import round_to

FACTORS = (0.3, -1.7, 1e-3)
SIZES = (0, 1, 2**16, 2**16 + 1, 100_003)


def reference(arrays, factors, dtype):
    with np.errstate(all="ignore"):
        total = dtype(factors[0]) * arrays[0].astype(dtype)
        for array, factor in zip(arrays[1:], factors[1:], strict=True):
            total = total + dtype(factor) * array.astype(dtype)
    return total


def same_bits(a, b):
    """Any NaN is as good as another: what is left of its payload depends on the processor."""
    nan = np.isnan(a)
    return (nan == np.isnan(b)).all() and a[~nan].tobytes() == b[~nan].tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("total", [np.float32, np.float64])
def test_sums_are_those_of_numpy(size, stored, total):
    rng = np.random.default_rng(size)
    arrays = [random_array(rng, (size,), stored) for _ in FACTORS]
    sums = np.full(size, np.nan, total)
    for i, (array, factor) in enumerate(zip(arrays, FACTORS, strict=True)):
        add(sums, array, factor, is_first=i == 0)
    assert same_bits(sums, reference(arrays, FACTORS, total))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("kept", [np.float32, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("total", [np.float32, np.float64])
def test_all_at_once_is_the_same(size, stored, kept, total):
    """Also where the result takes the place of the first array."""
    rng = np.random.default_rng(size)
    arrays = [random_array(rng, (size,), stored) for _ in FACTORS]
    wanted = np.empty(size, kept)
    round_to(wanted, reference(arrays, FACTORS, total))
    is_narrow = wanted.itemsize <= arrays[0].itemsize
    into = arrays[0].view(kept)[:size] if is_narrow else np.empty(size, kept)
    combine(into, arrays, FACTORS, np.dtype(total))
    assert same_bits(into, wanted)


def test_the_first_array_may_lie_where_the_sum_goes():
    values = np.arange(70_000, dtype=np.float32)
    sums = values.copy()
    add(sums, sums, 0.3, is_first=True)
    assert same_bits(sums, np.float32(0.3) * values)
