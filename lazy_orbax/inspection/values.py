"""The values of stored arrays, compared out of core: some megabytes of each at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from lazy_orbax.inspection.leaves import ItemLeaves
from lazy_orbax.integrity.chunk_location import chunk_shape
from lazy_orbax.integrity.digest import bytes_of
from lazy_orbax.integrity.stored_arrays import StoredArrays
from lazy_orbax.plan.boxes import parts

_PART_BYTES = 2**24
_CACHE_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far two arrays are apart.

    Attributes:
        is_same: whether they are the same, bit for bit.
        n_different: how many elements differ; two NaN do not.
        max_abs: the largest absolute difference of two elements.
        norm: the Euclidean norm of the difference.
        relative: that, divided by the norm of the first array.
    """

    is_same: bool
    n_different: int
    max_abs: float
    norm: float
    relative: float


def arrays_of(item: ItemLeaves) -> StoredArrays:
    """Returns what opens the arrays of an item.

    Args:
        item: whose metadata were checked.
    """
    contents, place = item.contents, item.contents.files.place
    cache = {"total_bytes_limit": _CACHE_BYTES}
    pools = {"cache_pool": cache, "cache_pool#ocdbt": cache}
    context = ts.Context({**pools, **place.context_spec()})
    base = ts.KvStore.open(place.kvstore_spec(), context=context).result()
    driver = "zarr3" if contents.tree is not None and contents.tree.use_zarr3 else "zarr"
    return StoredArrays(place, base, context, driver, contents.in_database)


def deviation(a: Any, b: Any, read: Callable[[int], None]) -> Deviation:
    """Compares two open arrays of the same shape.

    Args:
        a: TensorStore's array.
        b: the other.
        read: is told of the bytes of each part that was read, of one array.

    Raises:
        ValueError: a chunk cannot be read.
    """
    itemsize = max(a.dtype.numpy_dtype.itemsize, b.dtype.numpy_dtype.itemsize)
    is_same, n_different, largest, squares, whole = a.dtype == b.dtype, 0, 0.0, 0.0, 0.0
    for box in parts(tuple(a.shape), itemsize, _PART_BYTES, chunk_shape(a)):
        reading = a[box.index].read(), b[box.index].read()
        first, second = (np.asarray(future.result()) for future in reading)
        read(first.nbytes)
        if is_same and np.array_equal(bytes_of(first), bytes_of(second)):
            whole += _squares(_wide(first))
            continue
        is_same = False
        first, second = _wide(first), _wide(second)
        apart = (first != second) & ~(np.isnan(first) & np.isnan(second))
        with np.errstate(invalid="ignore", over="ignore"):
            delta = np.abs(np.where(apart, first, 0) - np.where(apart, second, 0))
        n_different += int(np.count_nonzero(apart))
        largest = float(np.maximum(largest, delta.max(initial=0)))
        squares, whole = squares + _squares(delta), whole + _squares(first)
    norm = math.sqrt(squares)
    relative = norm / math.sqrt(whole) if whole else math.inf if norm else 0.0
    return Deviation(is_same, n_different, largest, norm, relative)


def _wide(array: np.ndarray) -> np.ndarray:
    """Returns numbers in which differences are exact, or as good as they get."""
    is_long = array.dtype.kind in "iu" and array.dtype.itemsize == 8
    wide = np.longdouble if is_long else np.complex128 if array.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):  # There are NaN that signal.
        return array.astype(wide)


def _squares(array: np.ndarray) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sum(np.abs(array) ** 2))
