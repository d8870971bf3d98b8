"""No two members of a group fail together."""

import collections

import hypothesis
import hypothesis.strategies as st
import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity.groups import group_with, groups_of


@hypothesis.given(st.lists(st.integers(0, 12).map(str), min_size=2, max_size=80), st.integers(2, 9))
def test_each_process_is_in_one_group_and_no_two_of_a_domain(domains, wanted):
    most = max(collections.Counter(domains).values())
    if 2 * most > len(domains):
        with pytest.raises(KeeperError, match="another failure domain"):
            groups_of(domains, wanted)
        return
    groups = groups_of(domains, wanted)
    assert sorted(process for group in groups for process in group) == list(range(len(domains)))
    for group in groups:
        assert len(group) >= 2
        assert len({domains[process] for process in group}) == len(group)
        assert group_with(groups, group[-1]) == group


@pytest.mark.parametrize(("n_hosts", "per_host"), [(4, 1), (8, 8), (100, 4), (2500, 4)])
def test_where_processes_divide_groups_are_as_large_as_wanted(n_hosts, per_host):
    domains = [f"host{i // per_host}" for i in range(n_hosts * per_host)]
    assert {len(group) for group in groups_of(domains, 4)} == {4}


def test_few_hosts_make_smaller_groups():
    assert groups_of(["a", "a", "b", "b"], 4) == [(0, 2), (1, 3)]


def test_who_is_left_over_makes_a_group_larger():
    assert sorted(map(len, groups_of(list("abcdefg"), 3))) == [3, 4]


def test_alone_there_is_no_parity():
    with pytest.raises(KeeperError, match="'here' has 3 of 3"):
        groups_of(["here"] * 3, 3)
