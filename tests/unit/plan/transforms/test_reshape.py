"""Reshapes of arrays whose parts begin and end anywhere."""

import math

import numpy as np
import pytest
from equipment.numpy_reader import grid, read, whole

from lazy_orbax.plan.transforms.part import Origin
from lazy_orbax.plan.transforms.scalars import MisfitError
from lazy_orbax.plan.transforms.virtual_array import (
    fused,
    reshaped,
    section,
    stored_array,
)


def stored(name, *shape, first=0):
    values = np.arange(math.prod(shape)).reshape(shape) + first
    return stored_array(shape, values.dtype, Origin(name)), {name: values}


def rows_of_two(n_rows, first, end):
    """A flat array of rows, of which each comes from two leaves, and a section of it."""
    (a, stored_a), (b, stored_b) = stored("a", n_rows, 2), stored("b", n_rows, 3, first=100)
    array = section(reshaped(fused([a, b], 1), (-1,)), 0, first, end)
    leaves = stored_a | stored_b
    return array, np.concatenate([leaves["a"], leaves["b"]], 1).ravel()[first:end], leaves


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("inner", [1, 2, 5, 10])
def test_rows_that_begin_between_those_that_are_stored(first, inner):
    array, expected, leaves = rows_of_two(9, first, first + 40)
    expected = expected.reshape(-1, inner)
    if inner == 2:  # Not a divisor of the five of a stored row.
        with pytest.raises(MisfitError, match="no box is a box of what is stored"):
            reshaped(array, expected.shape)
        return
    array = reshaped(array, expected.shape)
    for box in (whole(expected.shape), *grid(expected.shape, [(1, 3), (1, 4)])):
        assert (read(array.takes(box), box, int, leaves) == expected[box.index]).all()


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ((6, 4), (4, 6)),
        ((4, 6), (3, 8)),
        ((2, 3, 4), (4, 3, 2)),
        ((9, 4), (6, 6)),
    ],
)
def test_axes_that_cross_are_refused(found, wanted):
    array, _ = stored("a", *found)
    with pytest.raises(MisfitError, match="only axes beside each other can be merged or split"):
        reshaped(array, wanted)
    with pytest.raises(MisfitError, match="no box"):
        reshaped(reshaped(array, (-1,)), wanted)


def test_axes_that_are_cut_where_the_stored_ones_end_are_not():
    array, leaves = stored("a", 8, 6)
    array = reshaped(array, (4, 12))
    for box in grid((4, 12), [(1,), (7,)]):
        expected = leaves["a"].reshape(4, 12)[box.index]
        assert (read(array.takes(box), box, int, leaves) == expected).all()


def test_parts_of_uneven_sizes_are_cut_where_a_row_begins():
    (a, stored_a), (b, stored_b) = stored("a", 5), stored("b", 7, first=100)
    array, leaves = reshaped(fused([a, b], 0), (3, 4)), stored_a | stored_b
    expected = np.concatenate([leaves["a"], leaves["b"]]).reshape(3, 4)
    takes = array.takes(whole((3, 4)))
    assert (read(takes, whole((3, 4)), int, leaves) == expected).all()
    assert [(take.leaf, take.shape) for take in takes] == [
        *(("a", (4,)), ("a", (1,))),
        *(("b", (3,)), ("b", (4,))),
    ]
