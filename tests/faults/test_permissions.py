"""A directory that may not be changed, and a quota: the save fails clearly and the next works.

We are root, whom mode bits do not stop, so ext4 is told that a directory is immutable or that it
is append-only: EPERM for everybody. EACCES and a used up quota (EDQUOT) are answers of the calls
themselves in `hung.py`, because many kernels know no quota.
"""

import errno
import os
import subprocess

import jax
import orbax.checkpoint as ocp
import pytest
from equipment.gates import held_at, within
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import assert_same
from faults import disks

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.snapshot.host_budget import HOST_BUDGET


def change(directory, how):
    """Sets or clears an attribute of ext4, which makes a directory immutable or append-only."""
    done = subprocess.run(["chattr", how, str(directory)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this file system has no such attribute: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    with disks.mounted("ext4", tmp_path / "disk", 64 * disks.MIB) as disk:
        (disk / "run").mkdir()
        yield disk
        for directory in [disk / "run", *(disk / "run").iterdir()]:
            subprocess.run(["chattr", "-R", "-ia", str(directory)], capture_output=True)


# What may not be changed, how, and when that comes about; who tells of it.
CASES = {
    "the run, before": ("run", "i", "before", OSError),
    "the item, while it is written": ("item", "i", "open", SaveError),
    "the run, before it is published": ("run", "a", "finish", OSError),
}


@pytest.mark.parametrize("case", CASES)
def test_a_directory_that_may_not_be_changed(disk, mesh, case):
    what, attribute, when, kind = CASES[case]
    run, state = disk / "run", make_state(mesh)
    places = {"run": run, "item": run / "2.orbax-checkpoint-tmp" / "default.orbax-checkpoint-tmp"}
    steps = Steps(state)
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(run, item_handlers=handler) as manager:
        failed = lazy_orbax.log_failed_saves(manager)
        within(manager.save, 1, args=ocp.args.StandardSave(state))
        within(manager.wait_until_finished)
        wanted = steps.bytes_of(state)
        state = steps.donating(state)
        with held_at(None if when == "before" else when) as gate:
            if when == "before":
                change(places[what], f"+{attribute}")
            within(manager.save, 2, args=ocp.args.StandardSave(state))
            if when != "before":
                gate.await_call()
                change(places[what], f"+{attribute}")
                gate.opened.set()
            within(manager.wait_until_finished)
        for _ in range(3):
            state = steps.donating(state)
        jax.block_until_ready(state)
        assert failed.count == 1
        assert isinstance(failed.last, kind)
        # What and where.
        assert os.strerror(errno.EPERM) in str(failed.last)
        assert str(run / "2.orbax-checkpoint-tmp") in str(failed.last)
        assert HOST_BUDGET.in_flight_bytes == 0
        assert manager.all_steps() == [1]
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(run / "1" / "default"), wanted)
        change(places[what], f"-{attribute}")
        wanted = steps.bytes_of(state)
        within(manager.save, 3, args=ocp.args.StandardSave(state))
        within(manager.wait_until_finished)
        assert failed.count == 1
        assert manager.all_steps() == [1, 3]
        assert disks.temporary(disk) == []
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(run / "3" / "default"), wanted)
