"""Which stored chunk goes where: tables, and every element exactly once, against NumPy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import chunk_reads, coalesced, rows_of


def test_a_chunk_that_is_a_wanted_box_goes_there_whole():
    (read,) = chunk_reads((8, 4), (8, 4), 4, (Box((0, 0), (8, 4)),))
    assert (read.position, read.box) == ((0, 0), Box((0, 0), (8, 4)))
    assert read.spans == ((0, 0, 128),)


@pytest.mark.parametrize(
    ("chunk", "wanted", "offsets"),
    [
        ((2, 4), Box((0, 0), (8, 4)), [0, 32, 64, 96]),  # Rows follow each other in memory.
        ((2, 4), Box((2, 0), (4, 4)), [0, 32]),
        ((8, 2), Box((0, 0), (8, 4)), [None, None]),  # Columns do not.
        ((1, 2), Box((0, 0), (1, 4)), [0, 8]),  # But those of one row do.
        ((3, 4), Box((0, 0), (8, 4)), [0, 48, None]),  # The last is stored with padding.
        ((4, 4), Box((1, 0), (3, 4)), [None]),  # Not all of it is wanted.
    ],
)
def test_where_a_chunk_goes_in_memory(chunk, wanted, offsets):
    reads = chunk_reads((8, 4), chunk, 4, (wanted,))
    found = [read.spans[0].offset if read.spans else None for read in reads]
    assert found == offsets


@pytest.mark.parametrize(
    ("boxes", "spans"),
    [
        ([((0, 0), (5, 4)), ((5, 0), (3, 4))], [(0, 0, 80), (1, 0, 48)]),
        ([((5, 0), (3, 4)), ((0, 0), (5, 4))], [(1, 0, 80), (0, 0, 48)]),  # As they are stored.
        ([((i, 0), (1, 4)) for i in range(8)], [(i, 0, 16) for i in range(8)]),
        ([((0, 0), (5, 4)), ((6, 0), (2, 4))], []),  # A row is not wanted.
        ([((0, 0), (5, 4)), ((4, 0), (4, 4))], []),  # One is wanted twice.
        ([((0, 0), (8, 4)), ((0, 0), (8, 4))], []),  # All are.
        ([((0, 0), (8, 2)), ((0, 2), (8, 2))], []),  # Columns are not in one piece.
    ],
)
def test_where_the_parts_of_a_chunk_go_in_memory(boxes, spans):
    (read,) = chunk_reads((8, 4), (8, 4), 4, tuple(Box(*box) for box in boxes))
    assert read.spans == tuple(spans)


def test_a_part_goes_behind_what_other_chunks_have_of_its_box():
    reads = chunk_reads((8, 4), (4, 4), 4, (Box((0, 0), (3, 4)), Box((3, 0), (5, 4))))
    assert [read.spans for read in reads] == [((0, 0, 48), (1, 0, 16)), ((1, 16, 64),)]


def test_a_chunk_that_two_boxes_want_is_read_once_and_scattered():
    boxes = (Box((0, 0), (8, 2)), Box((0, 2), (8, 2)))
    (read,) = chunk_reads((8, 4), (8, 4), 4, boxes)
    assert [one.wanted for one in read.placed] == [0, 1]
    assert read.spans == ()


def test_nothing_is_read_that_is_not_wanted():
    reads = chunk_reads((8, 8), (2, 2), 4, (Box((2, 4), (3, 2)),))
    assert [read.position for read in reads] == [(1, 2), (2, 2)]


def test_an_array_without_dimensions_is_one_chunk():
    (read,) = chunk_reads((), (), 4, (Box((), ()),))
    assert (read.position, read.spans) == ((), ((0, 0, 4),))


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    chunk = tuple(draw(st.integers(1, n)) for n in shape)
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        start = tuple(draw(st.integers(0, n - 1)) for n in shape)
        boxes.append(Box(start, tuple(draw(st.integers(1, n - a)) for a, n in zip(start, shape))))
    return shape, chunk, tuple(boxes)


def stored_chunk(whole, chunk, read):
    """A chunk as it is stored: of full size, with anything beyond the end of the array."""
    padded = np.full(chunk, -1, whole.dtype)
    padded[tuple(slice(n) for n in read.box.shape)] = whole[read.box.index]
    return padded


@given(arrays(), st.sampled_from([1, 16, 10**6]))
def test_each_element_of_each_box_comes_once_by_either_way(array, limit_bytes):
    shape, chunk, boxes = array
    whole = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    reads = chunk_reads(shape, chunk, 4, boxes)
    at_once = [np.zeros(box.shape, np.int32) for box in boxes]
    in_rows = [np.zeros(box.shape, np.int32) for box in boxes]
    for read in reads:
        padded = stored_chunk(whole, chunk, read)
        data = padded[tuple(slice(n) for n in read.box.shape)]
        content, done, kept = padded.reshape(-1), 0, []
        for wanted, offset, n_bytes in read.spans:
            first, n, done = offset // 4, n_bytes // 4, done + n_bytes // 4
            at_once[wanted].reshape(-1)[first : first + n] += content[done - n : done]
        assert done == (padded.size if read.spans else 0)
        done = 0
        for one in () if read.spans else read.placed:
            at_once[one.wanted][one.target] += data[one.source]
        for rows in rows_of(read, chunk, 4, limit_bytes):
            n = math.prod(rows.box.shape)
            part, done = content[done : done + n].reshape(rows.box.shape), done + n
            kept += [] if rows.kept is None else part[rows.kept].reshape(-1).tolist()
            for one in rows.placed:
                in_rows[one.wanted][one.target] += part[one.source]
        assert done == padded.size
        assert kept == data.reshape(-1).tolist()
    for box, first, second in zip(boxes, at_once, in_rows, strict=True):
        np.testing.assert_array_equal(first, whole[box.index])
        np.testing.assert_array_equal(second, whole[box.index])


@given(arrays())
def test_each_chunk_is_read_once_and_only_if_something_of_it_is_wanted(array):
    shape, chunk, boxes = array
    reads = chunk_reads(shape, chunk, 1, boxes)
    grid = itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunk, strict=True)))
    wanted = []
    for position in grid:
        start = tuple(i * c for i, c in zip(position, chunk, strict=True))
        inside = zip(start, chunk, shape, strict=True)
        mine = Box(start, tuple(min(c, n - a) for a, c, n in inside))
        if any(mine.overlap(box) for box in boxes):
            wanted.append(position)
    assert [read.position for read in reads] == wanted


def runs(extents, gap=2, most=100, members=10):
    return list(coalesced(extents, gap_bytes=gap, most_bytes=most, most_members=members))


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([(0, 5), (5, 5)], [(0, 10, (0, 1))]),
        ([(5, 5), (0, 5)], [(0, 10, (1, 0))]),
        ([(0, 5), (7, 5)], [(0, 12, (0, 1))]),
        ([(0, 5), (8, 5)], [(0, 5, (0,)), (8, 13, (1,))]),
        ([(0, 90), (90, 20)], [(0, 90, (0,)), (90, 110, (1,))]),
        ([(0, 500)], [(0, 500, (0,))]),
        ([(3, 0), (3, 4)], [(3, 7, (0, 1))]),
        ([], []),
    ],
)
def test_neighbours_are_read_at_once(extents, expected):
    assert runs(extents) == expected


def test_a_run_has_no_more_members_than_it_may():
    assert [run.members for run in runs([(i, 1) for i in range(5)], members=2)] == [
        (0, 1),
        (2, 3),
        (4,),
    ]


def test_values_on_top_of_each_other_are_an_error():
    with pytest.raises(ValueError, match="bytes 4 to 9"):
        runs([(0, 5), (4, 5)])
