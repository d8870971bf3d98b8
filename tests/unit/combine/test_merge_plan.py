"""Units cover each element once, in whole chunks, within the budget."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazy_orbax.combine.merge_plan import Cut, regions_in, share_of, units_of

SHAPES = st.lists(st.integers(1, 12), max_size=3).map(tuple)


@st.composite
def cuts(draw):
    shape = draw(SHAPES)
    chunk = st.tuples(*(st.integers(1, n) for n in shape))
    return Cut(shape, draw(chunk), tuple(draw(st.lists(chunk, min_size=1, max_size=3))), (4, 2))


@given(st.lists(cuts(), max_size=4), st.sampled_from([1, 256, 4096]))
def test_each_element_is_in_one_box_of_whole_chunks(leaves, limit_bytes):
    counts = [np.zeros(cut.shape, int) for cut in leaves]
    for unit in units_of(list(enumerate(leaves)), limit_bytes):
        assert unit.n_bytes <= max(limit_bytes, 128) or len(unit.parts) == 1
        for part, regions in zip(unit.parts, regions_in(unit), strict=True):
            counts[part.leaf][part.box.index] += 1
            cut = leaves[part.leaf]
            for a, n, c, whole in zip(
                part.box.start, part.box.shape, cut.chunk, cut.shape, strict=True
            ):
                assert a % c == 0
                assert n % c == 0 or a + n == whole
            n_elements = int(np.prod(part.box.shape))
            assert [stop - start for start, stop in regions] == [4 * n_elements, 2 * n_elements]
    assert all((count == 1).all() for count in counts)


def boxes(cut, limit_bytes):
    return [p.box.shape for u in units_of([(0, cut)], limit_bytes) for p in u.parts]


def test_chunks_of_sources_are_not_cut_where_that_fits():
    cut = Cut((8, 8), (2, 8), ((2, 8), (8, 4)), (4,))
    assert boxes(cut, 256) == [(8, 8)]
    assert boxes(cut, 255) == [(2, 8)] * 4


def test_an_array_without_elements_has_no_units():
    assert boxes(Cut((3, 0), (3, 1), ((3, 1),), (4,)), 100) == []


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_has_a_share(processes):
    cut = Cut((64, 1024), (1, 1024), ((1, 1024),), (4, 4))
    units = list(units_of([(0, cut)], 2**15))
    shares = [share_of(units, i, processes) for i in range(processes)]
    assert sorted(map(id, itertools.chain(*shares))) == sorted(map(id, units))
    loads = [sum(unit.n_bytes for unit in share) for share in shares]
    assert max(loads) - min(loads) <= max(unit.n_bytes for unit in units)
