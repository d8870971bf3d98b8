"""Rounding against the nearest neighbours."""

import ml_dtypes
import numpy as np
import pytest

from lazy_orbax.restore.rounding import round_to


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16]
)
def test_float64_is_rounded_once(dtype):
    """As near as can be to the ties, where rounding by way of float32 would be wrong."""
    some = np.arange(256, dtype=np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint8)
    low = some.view(dtype).astype(np.float64)
    if np.dtype(dtype).itemsize == 2:
        low = (some + np.uint16(0x3C00)).view(dtype).astype(np.float64)
    low = np.unique(low[np.isfinite(low)])
    middle = (low[:-1] + low[1:]) / 2
    values = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    found = np.empty(values.size, dtype)
    round_to(found, values)
    below, above = np.tile(low[:-1], 3), np.tile(low[1:], 3)
    even = below.astype(dtype).view(some.dtype) % 2 == 0
    wanted = np.where(
        values < np.tile(middle, 3), below, np.where(values > np.tile(middle, 3), above, 0)
    )
    is_tie = values == np.tile(middle, 3)
    wanted = np.where(is_tie, np.where(even, below, above), wanted)
    assert found.astype(np.float64).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0), (2**16 + 1,), (3, 70_000), (70_000, 3), (2, 300, 200)]
)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_an_array_is_rounded_as_its_elements_are_whatever_its_shape(shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape)
    found = np.empty(shape[::-1], dtype).T
    round_to(found, values)
    one_by_one = np.empty(values.size, dtype)
    round_to(one_by_one, values.reshape(-1))
    assert found.tobytes() == one_by_one.tobytes()
