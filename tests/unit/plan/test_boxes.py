"""Boxes against what NumPy says of the elements that they cover."""

import itertools
import math

import numpy as np
import pytest

from lazy_orbax.plan.boxes import Box, index_of, parts

WHOLE = (4, 5)
BOXES = [
    Box((a, b), (n, m))
    for (a, n), (b, m) in itertools.product([(0, 1), (0, 4), (1, 2), (3, 1)], [(0, 5), (2, 2)])
]


def covered(box):
    """The elements of an array of shape `WHOLE` that a box covers."""
    mask = np.zeros(WHOLE, bool)
    mask[box.index] = True
    return mask


def test_a_rectangle_as_an_index():
    assert index_of((3, 0), (1, 6)) == (slice(3, 4), slice(0, 6))
    assert index_of((3, 7), (1, 6), (2, 5)) == (slice(1, 2), slice(2, 8))
    assert index_of((), ()) == index_of((), (), ()) == ()
    with pytest.raises(ValueError, match="shorter"):
        index_of((3, 0), (1,))
    with pytest.raises(ValueError, match="shorter"):
        index_of((3, 0), (1, 6), (2,))


@pytest.mark.parametrize("one", BOXES, ids=str)
def test_what_two_boxes_have_in_common(one):
    for other in BOXES:
        both = covered(one) & covered(other)
        common = one.overlap(other)
        if common is None:
            assert not both.any()
        else:
            assert all(n > 0 for n in common.shape)
            assert (covered(common) == both).all()
        assert one.is_within(other) == (both == covered(one)).all()


def test_boxes_of_arrays_of_other_dimensions_have_nothing_in_common():
    flat, square = Box((0,), (9,)), Box((0, 0), (9, 9))
    assert flat.overlap(square) is square.overlap(flat) is None
    assert not flat.is_within(square)
    assert not square.is_within(flat)


def test_an_empty_box_is_within_itself_alone():
    empty = Box((1, 0), (2, 0))
    assert empty.is_within(Box((1, 0), (2, 0)))
    assert not empty.is_within(Box((0, 0), (4, 5)))
    assert empty.overlap(empty) is None


def test_a_box_whose_start_has_other_dimensions_than_its_shape_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        Box((0, 0), (1,)).overlap(Box((0, 0), (1, 1)))


def test_the_one_box_of_a_scalar_is_in_common():
    assert Box((), ()).overlap(Box((), ())) == Box((), ())


def test_a_box_relative_to_another_indexes_what_that_covers():
    array = np.arange(math.prod(WHOLE)).reshape(WHOLE)
    whole, part = Box((1, 2), (3, 3)), Box((2, 3), (2, 1))
    assert (array[whole.index][part.relative_to(whole)] == array[part.index]).all()


def test_a_box_in_a_message():
    assert str(Box((0, 12), (3, 4))) == "[0:3, 12:16]"
    assert str(Box((), ())) == "[]"


def test_boxes_are_compared_by_value_and_cannot_be_changed():
    assert len({Box((1,), (2,)), Box((1,), (2,)), Box((2,), (1,))}) == 2
    with pytest.raises(AttributeError):
        Box((1,), (2,)).start = (2,)


def bounds(shape, itemsize, limit_bytes, chunk=None):
    """Start and shape of each part."""
    return [(box.start, box.shape) for box in parts(shape, itemsize, limit_bytes, chunk)]


def test_parts_have_as_many_rows_as_fit():
    assert bounds((10,), 4, 12) == [((0,), (3,)), ((3,), (3,)), ((6,), (3,)), ((9,), (1,))]
    assert bounds((5,), 1, 4) == [((0,), (4,)), ((4,), (1,))]
    assert bounds((10,), 4, 40) == [((0,), (10,))]
    assert bounds((10,), 4, 10**6) == [((0,), (10,))]
    assert bounds((3, 3), 2, 6) == [((i, 0), (1, 3)) for i in range(3)]
    assert bounds((4, 3), 4, 24) == [((0, 0), (2, 3)), ((2, 0), (2, 3))]
    assert bounds((4, 3), 2, 15) == [((0, 0), (2, 3)), ((2, 0), (2, 3))]


def test_parts_of_rows_that_do_not_fit_are_parts_of_a_row():
    halves = [((0, 0), (1, 3)), ((0, 3), (1, 2)), ((1, 0), (1, 3)), ((1, 3), (1, 2))]
    assert bounds((2, 5), 2, 7) == halves
    assert bounds((2, 3, 4), 1, 4) == [
        ((i, j, 0), (1, 1, 4)) for i, j in itertools.product(range(2), range(3))
    ]
    assert bounds((2, 3, 4), 1, 8) == [
        part for i in range(2) for part in [((i, 0, 0), (1, 2, 4)), ((i, 2, 0), (1, 1, 4))]
    ]


def test_an_element_larger_than_the_limit_is_a_part_by_itself():
    assert bounds((2, 2), 8, 7) == [((i, j), (1, 1)) for i in range(2) for j in range(2)]
    assert bounds((), 8, 7) == bounds((), 8, 100) == [((), ())]


@pytest.mark.parametrize("chunk", [None, (1, 1), (2, 3)])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_an_array_without_elements_has_no_part_with_some(shape, chunk):
    assert not [part for part in bounds(shape, 4, 100, chunk) if math.prod(part[1])]


def test_parts_are_cut_between_chunks():
    rows_of_3 = [((i, 0), (min(3, 10 - i), 4)) for i in range(0, 10, 3)]
    assert bounds((10, 4), 1, 23, (3, 2)) == rows_of_3  # 5 rows would fit.
    assert bounds((10, 4), 1, 24, (3, 2)) == [((0, 0), (6, 4)), ((6, 0), (4, 4))]
    # Rows of whole chunks may take four times the limit, and no more.
    assert bounds((10, 4), 1, 3, (3, 2)) == rows_of_3
    assert bounds((10, 4), 1, 2, (3, 2)) == bounds((10, 4), 1, 2)
    assert bounds((12, 4), 1, 5, (6, 2)) == bounds((12, 4), 1, 5)
    assert bounds((12, 4), 1, 6, (6, 2)) == [((0, 0), (6, 4)), ((6, 0), (6, 4))]
    assert bounds((10, 4), 2, 6, (3, 2)) == rows_of_3
    assert bounds((10, 4), 2, 5, (3, 2)) == bounds((10, 4), 2, 5)
    assert bounds((10, 4), 2, 48, (3, 2)) == [((0, 0), (6, 4)), ((6, 0), (4, 4))]
    assert bounds((10, 4), 1, 28, (2, 2)) == [((0, 0), (6, 4)), ((6, 0), (4, 4))]
    assert bounds((4, 2, 3), 2, 6, (2, 1, 1)) == [((0, 0, 0), (2, 2, 3)), ((2, 0, 0), (2, 2, 3))]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 1, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("itemsize", [1, 4])
def test_parts_follow_each_other_in_c_order(shape, itemsize):
    array = np.arange(math.prod(shape)).reshape(shape)
    chunks = [None, tuple(max(1, n // 2) for n in shape)]
    for limit_bytes, chunk in itertools.product([1, 4, 7, 16, 10**3], chunks):
        boxes = list(parts(shape, itemsize, limit_bytes, chunk))
        found = np.concatenate([array[box.index].ravel() for box in boxes])
        assert found.tolist() == array.ravel().tolist()
        assert [array[box.index].shape for box in boxes] == [box.shape for box in boxes]
        if chunk is None:
            assert max(math.prod(box.shape) for box in boxes) <= max(1, limit_bytes // itemsize)
