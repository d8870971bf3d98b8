"""Whichever member is lost, the others make its snapshot again, whatever the sizes are."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lazy_orbax.tiers.parity.stripes import (
    add,
    make_parity,
    others,
    parity_bytes,
    rebuild,
    stripe_bytes,
    stripe_of,
)


class Group:
    """Snapshots, and the parity that each member has of the others."""

    def __init__(self, sizes, seed, chunk):
        self.n, self.sizes, self.chunk = len(sizes), sizes, chunk
        rng = np.random.default_rng(seed)
        self.snapshots = [rng.integers(0, 256, size, np.uint8) for size in sizes]
        self.parities = [self._parity(holder) for holder in range(self.n)]

    def _parts(self, content):
        for at in range(0, content.size, self.chunk):
            yield at, content[at : at + self.chunk].tobytes()

    def stripe(self, owner, holder):
        first, end = stripe_of(self.sizes[owner], self.n, owner, holder)
        return self._parts(self.snapshots[owner][first:end])

    def _parity(self, holder):
        # What was there before must not count.
        target = np.full(parity_bytes(self.sizes, holder), 99, np.uint8)
        make_parity(target, self.sizes, holder, lambda owner: self.stripe(owner, holder))
        return target

    def rebuilt(self, lost):
        target, asked = np.full(self.sizes[lost], 77, np.uint8), set()

        def parity(holder):
            asked.add(holder)
            return self._parts(self.parities[holder])

        def stripe(owner, holder):
            asked.update((owner, holder))
            return self.stripe(owner, holder)

        rebuild(target, self.sizes, lost, parity, stripe)
        assert lost not in asked
        return target


groups = st.builds(
    Group,
    st.lists(st.integers(0, 3000), min_size=2, max_size=8),
    st.integers(0, 99),
    st.sampled_from([1 << 20, 64, 61, 1000]),
)


@hypothesis.given(groups)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_lost_member_comes_back_bit_for_bit(group):
    for lost in range(group.n):
        np.testing.assert_array_equal(group.rebuilt(lost), group.snapshots[lost])


@hypothesis.given(st.integers(0, 10**13), st.integers(2, 64), st.data())
def test_the_stripes_of_a_snapshot_are_all_of_it_once_and_each_has_another_holder(size, n, data):
    owner = data.draw(st.integers(0, n - 1))
    found = sorted(stripe_of(size, n, owner, holder) for holder in others(n, owner))
    assert found[0][0] == 0
    assert found[-1][1] == size
    assert all(end == first for (_, end), (first, _) in zip(found, found[1:]))
    assert all(end - first <= stripe_bytes(size, n) for first, end in found)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_equal_members_keep_a_part_of_a_snapshot(n):
    assert parity_bytes([10**9] * n, 0) <= 10**9 / (n - 1) + 64


def test_of_two_members_each_has_a_copy():
    group = Group([1000, 700], 3, 256)
    np.testing.assert_array_equal(group.parities[1][:1000], group.snapshots[0])
    np.testing.assert_array_equal(group.parities[0][:700], group.snapshots[1])


def test_a_flipped_bit_of_anybody_is_a_flipped_bit_of_what_is_rebuilt():
    """So whoever rebuilds has to compare: XOR alone tells of nothing."""
    group = Group([640, 640, 640], 5, 1000)
    group.parities[1][5] ^= 4
    wrong = group.rebuilt(0) ^ group.snapshots[0]
    first, _ = stripe_of(640, 3, 0, 1)
    assert wrong.sum() == wrong[first + 5] == 4


def test_padding_is_left_out():
    target = np.zeros(10, np.uint8)
    add(target, 8, bytes([1, 2, 3, 4]))
    add(target, 20, b"12345678")
    assert target.tolist() == [0] * 8 + [1, 2]


def test_members_begin_with_different_ones():
    assert [next(others(4, place)) for place in range(4)] == [1, 2, 3, 0]
    assert sorted(others(5, 2, 4)) == [0, 1, 3]
