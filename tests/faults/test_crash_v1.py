"""Saves of Orbax v1 that are killed, or whose power is cut, at every call; and finished ones."""

from __future__ import annotations

import os
import shutil

import jax
import numpy as np
import pytest
from equipment.trees import assert_same
from faults import crashes
from orbax.checkpoint import v1

from lazy_orbax.handlers.v1 import lazy_v1

WAYS = ("save", "Checkpointer")
EVERY_POINT = os.environ.get("LAZY_ORBAX_EVERY_POINT") == "1"
# On this, what was not synced of a file is lost even where ext4 would have saved it.
NO_HEURISTIC = "ext4 noauto_da_alloc"
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


def steps_in(root):
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdecimal())


def assert_whole(root, *steps):
    """Asserts that stock v1 restores these steps."""
    for step in steps:
        found = v1.load(root / f"{step}", jax.tree.map(np.zeros_like, crashes.wanted(step)))
        assert_same(found, crashes.wanted(step))


def save_again(root, step):
    """Saves another step as a new process does."""
    undo = lazy_v1()
    v1.save(root / f"{step}", crashes.wanted(step))
    undo()
    assert_whole(root, step)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_save_killed_at_every_call(zygote, tmp_path, tell, way):
    first, root = tmp_path / "first", tmp_path / "run"
    zygote.save(first, 1, v1=way)
    n_deaths, failures = 0, []

    def kill(call="", nth=1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first, root)
        calls = zygote.die(root, 2, {"call": call, "nth": nth}, v1=way)
        listed = [1, 2] if crashes.published(calls, 2) else [1]
        try:
            assert steps_in(root) == listed
            assert_whole(root, *listed)
            save_again(root, 3 if 2 in listed else 2)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"killed before {nth}. {call or 'nothing'}: {error!r}")
        return calls

    runs = [kill()[:-1] for _ in range(2)]
    points = {call: max(run.count(call) for run in runs) for run in runs for call in run}
    for call, n_calls in points.items():
        for nth in range(1, n_calls + 1):
            kill(call, nth)
            n_deaths += 1
    assert not failures, "\n".join(failures)
    what = "Saves killed at every call that changes the file system"
    tell(what, f"v1, {way}", f"{max(map(len, runs))} calls", f"{n_deaths} kills")


@pytest.mark.parametrize(
    "late",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["at once", "a little later"],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_finished_survives_a_power_cut(zygote, tmp_path, way, late):
    first = tmp_path / "first"
    zygote.save(first, 1, v1=way)
    with crashes.disk_or_skip(tmp_path, "ext4") as disk:
        root = disk.replace(first)
        death = {"call": "", "nth": 1, "cut": str(disk.mounted), "late": late}
        calls = zygote.die(root, 2, death, v1=way)
        disk.after_the_cut(root, tmp_path / "copy")
    assert calls[-1] == "finished"
    assert steps_in(tmp_path / "copy") == [1, 2]
    assert_whole(tmp_path / "copy", 1, 2)


OTHER_CUTS = [(way, kind) for way in WAYS for kind in (NO_HEURISTIC, "ext4", "xfs")][1:]
CUTS = [
    (WAYS[0], NO_HEURISTIC),
    *(pytest.param(*cut, marks=pytest.mark.slow) for cut in OTHER_CUTS),
]


@pytest.fixture
def disk(request, tmp_path):
    with crashes.disk_or_skip(tmp_path, request.param) as disk:
        yield disk


@pytest.mark.parametrize(("way", "disk"), CUTS, indirect=["disk"])
def test_a_save_whose_power_is_cut_at_every_call(zygote, disk, tmp_path, tell, request, way):
    first, copy = tmp_path / "first", tmp_path / "copy"
    zygote.save(first, 1, v1=way)

    def cut(call="", nth=1, *, late):
        root = disk.replace(first)
        death = {"call": call, "nth": nth, "cut": str(disk.mounted), "late": late}
        calls = zygote.die(root, 2, death, v1=way)
        disk.after_the_cut(root, copy)
        return calls

    run = cut(late=False)[:-1]
    renamed = run.index("rename /2")
    # From the first call on the step's own metadata that is the last, until the step is durable.
    last_metadata = "write /2.orbax-checkpoint-tmp/_CHECKPOINT_METADATA"
    begin = max(i for i, call in enumerate(run) if call == last_metadata) - 2
    begin, end = (0, len(run)) if EVERY_POINT else (begin, run.index("fsync ", renamed) + 1)
    n_cuts, n_listed, failures = 0, 0, []
    for late in [True, False] if EVERY_POINT else [True]:
        for position in range(begin, end):
            call, nth = run[position], run[: position + 1].count(run[position])
            calls = cut(call, nth, late=late)
            n_cuts += 1
            is_synced = (
                "fsync " in calls[calls.index("rename /2") : -1]
                if crashes.published(calls, 2)
                else False
            )
            try:
                assert steps_in(copy) in ([[1, 2]] if is_synced else [[1], [1, 2]])
                for step in steps_in(copy):
                    assert (copy / f"{step}" / "_CHECKPOINT_METADATA").read_bytes()
                    assert v1.metadata(copy / f"{step}").commit_timestamp_nsecs
                assert_whole(copy, *steps_in(copy))
                n_listed += 2 in steps_in(copy)
                save_again(copy, 3)
            except Exception as error:  # noqa: BLE001 - All are told at the end.
                failures.append(f"cut before {nth}. {call}, late={late}: {error!r}")
    assert not failures, "\n".join(failures)
    assert 0 < n_listed < n_cuts
    kind = request.node.callspec.params["disk"]
    found = f"{n_listed} listed the step, with its metadata and whole"
    tell("Power cuts", kind, f"v1, {way}", f"{n_cuts} cuts in a save", found)
