"""What a run costs, and what is stored again and again."""

from __future__ import annotations

import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax import LazyOptions
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


def test_a_file_that_several_steps_have_is_counted_once(tmp_path):
    options = LazyOptions(skip_unchanged=True)
    handler = lazy_orbax.pytree_handler(options=options, use_ocdbt=False, use_compression=False)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for step in range(3):
            tree = {"frozen": np.ones(2**12), "w": np.full(8, step)}
            manager.save(step, args=ocp.args.PyTreeSave(tree))
    use = du(tmp_path)
    sizes = [entry.n_bytes for entry in ls(tmp_path).steps]
    assert [step.linked_bytes for step in use.steps] == [0, 2**15, 2**15]
    assert [step.n_bytes + step.linked_bytes for step in use.steps] == sizes
    files = [path.stat() for path in tmp_path.glob("[0-9]/**/*") if path.is_file()]
    assert use.n_bytes == sum({file.st_ino: file.st_size for file in files}.values())
    assert (use.linked_bytes, use.repeated_bytes) == (2**16, 0)
    assert "65.5 kB more are linked" in str(use)


def test_the_tree_has_each_step(runs):
    root = du(runs / "lazy").tree().root
    assert [node.name for node in root.inner] == ["1", "2", "12"]
    assert root.n_bytes == sum(node.n_bytes for node in root.inner)
