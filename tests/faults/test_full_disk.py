"""A full disk: the save fails, its files go, training goes on, and the next save works."""

import contextlib
import errno
import os

import jax
import orbax.checkpoint as ocp
import pytest
from equipment.gates import held_at, within
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import assert_same
from faults import disks

import lazy_orbax
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

POINTS = 10


def saved(manager, step, state):
    within(manager.save, step, args=ocp.args.StandardSave(state))
    within(manager.wait_until_finished)


@pytest.mark.parametrize(("kind", "use_ocdbt"), [("tmpfs", True), ("ext4", True), ("ext4", False)])
def test_a_disk_that_is_full_at_any_point_of_a_save(
    tmp_path, mesh, kind, use_ocdbt, record_property
):
    state = make_state(mesh)
    steps = Steps(state)
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES)
    handler = lazy_orbax.standard_handler(options=options, use_ocdbt=use_ocdbt)
    keep_one = ocp.CheckpointManagerOptions(max_to_keep=1)
    with (
        disks.mounted(kind, tmp_path / "disk", 64 * disks.MIB) as disk,
        ocp.CheckpointManager(disk / "run", item_handlers=handler, options=keep_one) as manager,
    ):
        failed = lazy_orbax.log_failed_saves(manager)
        saved(manager, 0, state)
        needed = disks.bytes_in(disk / "run" / "0")
        last, wanted = 0, steps.bytes_of(state)
        for point in range(POINTS):
            full_step = 10 * point + 5
            state = steps.donating(state)
            with disks.filled(disk, needed * point // POINTS):
                saved(manager, full_step, state)
                for _ in range(3):
                    state = steps.donating(state)
                jax.block_until_ready(state)
                assert HOST_BUDGET.in_flight_bytes == 0
                assert disks.temporary(disk) == []
            assert failed.count == point + 1
            # Where not even the directory could be created, the error is Orbax's.
            assert isinstance(failed.last, lazy_orbax.errors.SaveError | OSError)
            assert os.strerror(errno.ENOSPC) in str(failed.last)
            assert f"/{full_step}.orbax" in str(failed.last)
            # Orbax had forgotten the step that the failed one would have replaced.
            assert manager.all_steps() == [last]
            with ocp.StandardCheckpointer() as stock:
                assert_same(stock.restore(disk / "run" / f"{last}" / "default"), wanted)
            last, wanted = full_step + 5, steps.bytes_of(state)
            saved(manager, last, state)
            assert manager.all_steps() == [last]
            assert sorted(os.listdir(disk / "run")) == [str(last)]
            form = "OCDBT" if use_ocdbt else "Zarr"
            row = f"{kind}, {form}", f"full after {point}/{POINTS}", "removed, next save committed"
            record_property("table row", ("full disks", *row))
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(disk / "run" / f"{last}" / "default"), wanted)


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_a_disk_that_becomes_read_only(tmp_path, mesh, when):
    state = make_state(mesh)
    steps = Steps(state)
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES)
    handler = lazy_orbax.standard_handler(options=options)
    with (
        disks.mounted("tmpfs", tmp_path / "disk", 64 * disks.MIB) as disk,
        ocp.CheckpointManager(disk / "run", item_handlers=handler) as manager,
    ):
        failed = lazy_orbax.log_failed_saves(manager)
        saved(manager, 1, state)
        wanted = steps.bytes_of(state)
        state = steps.donating(state)
        if when == "before":
            disks.remount(disk, "ro")
            saved(manager, 2, state)
        else:
            with held_at("open") as gate:
                within(manager.save, 2, args=ocp.args.StandardSave(state))
                gate.await_call()
                disks.remount(disk, "ro")
                gate.opened.set()
                within(manager.wait_until_finished)
        assert failed.count == 1
        assert os.strerror(errno.EROFS) in str(failed.last)
        assert HOST_BUDGET.in_flight_bytes == 0
        assert manager.all_steps() == [1]
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(disk / "run" / "1" / "default"), wanted)
        disks.remount(disk, "rw")
        state = steps.donating(state)
        saved(manager, 3, state)
        assert manager.all_steps() == [1, 3]
        assert disks.temporary(disk) == []
        with ocp.StandardCheckpointer() as stock:
            assert_same(stock.restore(disk / "run" / "3" / "default"), steps.bytes_of(state))


def episode(manager, disk, step, state, *, leave_bytes=None):
    """Saves a step as a loop does that goes on whatever a save says. Returns whether it failed."""
    is_full = leave_bytes is not None
    try:
        with disks.filled(disk, leave_bytes) if is_full else contextlib.nullcontext():
            saved(manager, step, state)
    except (lazy_orbax.errors.SaveError, OSError):
        return True
    return False


@pytest.mark.parametrize("logs", [False, True])
def test_a_disk_with_room_for_few_steps_that_is_full_again_and_again(tmp_path, mesh, logs):
    state = make_state(mesh)
    two = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        disks.mounted("tmpfs", tmp_path / "disk", 36 * disks.MIB) as disk,
        ocp.CheckpointManager(
            disk / "run", item_handlers=lazy_orbax.standard_handler(), options=two
        ) as manager,
    ):
        failed = lazy_orbax.log_failed_saves(manager) if logs else None
        saved(manager, 0, state)
        saved(manager, 1, state)
        kept = [0, 1]
        # More often than there would be room for what Orbax forgets.
        rooms = disks.free_bytes(disk) // disks.bytes_in(disk / "run" / "1")
        assert rooms > 2
        for step in range(2, 2 + 4 * rooms, 2):
            # Where Orbax's own files are refused as well it tells of the failure twice.
            raised = episode(manager, disk, step, state, leave_bytes=0 if logs else 2**17)
            assert raised != logs
            assert not episode(manager, disk, step + 1, state)
            kept = [kept[1], step + 1]
            assert sorted(os.listdir(disk / "run"), key=int) == list(map(str, kept))
            assert manager.all_steps() == kept
        assert failed is None or failed.count == 2 * rooms


def test_a_disk_without_room_because_more_steps_are_there_than_are_kept(tmp_path, mesh):
    state = make_state(mesh)
    with disks.mounted("tmpfs", tmp_path / "disk", 36 * disks.MIB) as disk:
        with ocp.CheckpointManager(disk / "run") as stock:
            saved(stock, 0, state)
            step_bytes = disks.bytes_in(disk / "run" / "0")
            n = 1
            while disks.free_bytes(disk) > 1.2 * step_bytes:
                saved(stock, n, state)
                n += 1
        assert n > 2
        balloon = disk / "balloon"
        balloon.write_bytes(bytes(max(0, disks.free_bytes(disk) - step_bytes // 2)))
        two = ocp.CheckpointManagerOptions(max_to_keep=2)
        with ocp.CheckpointManager(
            disk / "run", item_handlers=lazy_orbax.standard_handler(), options=two
        ) as manager:
            assert manager.all_steps() == list(range(n))
            # Nothing is removed before a save has failed.
            assert episode(manager, disk, n, state)
            assert sorted(map(int, os.listdir(disk / "run"))) == list(range(n))
            assert not episode(manager, disk, n + 1, state)
            assert sorted(map(int, os.listdir(disk / "run"))) == [n - 1, n + 1]
            assert manager.all_steps() == [n - 1, n + 1]
        with ocp.StandardCheckpointer() as stock:
            assert_same(
                stock.restore(disk / "run" / f"{n + 1}" / "default"), Steps(state).bytes_of(state)
            )
