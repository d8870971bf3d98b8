"""What a run costs, and what is stored again and again."""

from __future__ import annotations

import pytest

from lazy_orbax.inspection.du import du
from lazy_orbax.inspection.ls import ls


def test_leaves_that_never_change_are_told_by_their_digests(runs):
    use = du(runs / "lazy")
    (fixed,) = use.fixed
    assert (fixed.item, fixed.name, fixed.n_bytes, fixed.n_steps) == ("default", "fixed", 16, 3)
    assert [step.repeated_bytes for step in use.steps] == [None, 16, 16]
    assert use.repeated_bytes == 32
    assert "1 leaves never change" in str(use)


@pytest.mark.parametrize("run", ["stock", "v1", "lazy", "torn", "hostile"])
def test_sizes_are_those_of_the_files(runs, run):
    use = du(runs / run)
    assert [step.n_bytes for step in use.steps] == [e.n_bytes for e in ls(runs / run).steps]
    assert use.n_bytes == sum(step.n_bytes for step in use.steps)
    assert bool(use.uncommitted_bytes) == (run == "torn")


def test_without_digests_nothing_is_claimed(runs):
    use = du(runs / "stock")
    assert (use.fixed, use.n_compared) == ((), 0)
    assert all(step.repeated_bytes is None for step in use.steps)
    assert "not known" in str(use)


def test_the_tree_has_each_step(runs):
    root = du(runs / "lazy").tree().root
    assert [node.name for node in root.inner] == ["1", "2", "12"]
    assert root.n_bytes == sum(node.n_bytes for node in root.inner)
