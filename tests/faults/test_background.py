"""A save that fails in the background: told once, with its cause, and nothing else is harmed."""

from __future__ import annotations

import concurrent.futures
import errno
import gc
import os
import queue
import resource
import subprocess
import threading
import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.daily import rotated
from equipment.gates import Boom, await_budget, failing_at, held_at, join_threads, within
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import assert_same

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity.proof import stop_preparing
from lazy_orbax.save import writer
from lazy_orbax.save.pipeline import Save
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

MODES = ("stage", "direct", "accelerator")
_FAULTS = [
    ("copy", 1),
    ("copy", 3),
    ("to the host", 1),
    ("to the host", 3),
    ("open", 1),
    ("views", 1),
    ("views", 3),
    ("hand over", 1),
    ("hand over", 3),
    ("wait", 1),
    ("wait", 3),
    ("finish", 1),
    ("sync", 1),
    ("sync", 4),
]


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """How the snapshot is taken; `accelerator` is staging where the copy has to be fetched."""
    if request.param == "accelerator":
        monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
        return "stage"
    return request.param


def handler_of(mode="auto", *, options=None, **kwargs):
    options = {"mode": mode, "slab_bytes": SLAB_BYTES, **(options or {})}
    return lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(**options), **kwargs)


def manager_of(path, handler, **options):
    return ocp.CheckpointManager(
        path, item_handlers=handler, options=ocp.CheckpointManagerOptions(**options)
    )


def save(manager, step, state):
    within(manager.save, step, args=ocp.args.StandardSave(state))


def assert_told(error, step):
    """The error says what failed, where, and why."""
    assert isinstance(error, SaveError), repr(error)
    assert error.__cause__ is not None
    assert error.step == step
    assert error.directory
    assert f"step {step}" in str(error)
    assert error.directory in str(error)


def assert_unharmed(manager, path, steps):
    """Only the steps of `steps`, a dictionary, are visible, and each restores bit for bit."""
    stop_preparing()  # A compiler takes its time.
    join_threads("lazy_orbax", "async_save")
    assert HOST_BUDGET.in_flight_bytes == 0
    assert manager.latest_step() == max(steps)
    published = [name for name in os.listdir(path) if name.isdigit()]
    assert sorted(published) == sorted(map(str, steps))
    with ocp.CheckpointManager(path, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == sorted(steps)
        for step, wanted in steps.items():
            assert_same(stock.restore(step), wanted)


def assert_next_save_works(manager, path, steps, state, wanted):
    """The manager and the handler go on as if nothing had happened."""
    step = max(steps) + 10
    save(manager, step, state)
    within(lazy_orbax.wait_until_staged)
    within(manager.wait_until_finished)
    assert_unharmed(manager, path, {**steps, step: wanted})


@pytest.mark.parametrize(("place", "call", "mode"), rotated(_FAULTS, MODES), indirect=["mode"])
def test_a_fault_at_any_stage(tmp_path, mesh, mode, place, call):
    state = make_state(mesh)
    steps = Steps(state)
    first = steps.bytes_of(state)
    with manager_of(tmp_path, handler_of(mode)) as manager:
        save(manager, 1, state)
        state = steps.donating(state)
        within(manager.wait_until_finished)
        with failing_at(place, call=call), pytest.raises(SaveError) as caught:
            save(manager, 2, state)
            state = steps.donating(state)
            within(manager.wait_until_finished)
        assert_told(caught.value, 2)
        assert isinstance(caught.value.__cause__, Boom)
        assert_unharmed(manager, tmp_path, {1: first})
        assert_next_save_works(manager, tmp_path, {1: first}, state, steps.bytes_of(state))


def test_a_thread_that_cannot_be_started_leaves_the_writer_waiting_for_nothing(
    tmp_path, mesh, monkeypatch
):
    """Orbax's thread may be faster than the training thread, and waits for slabs by then."""
    state, start, writes = make_state(mesh), threading.Thread.start, threading.Event()
    open_, wanted = writer.Writer.__init__, Steps(state).bytes_of(state)

    def opening(self, *args, **kwargs):
        writes.set()
        open_(self, *args, **kwargs)

    def out_of_threads(thread):
        if thread.name == "lazy_orbax-stage":
            assert writes.wait(30)
            raise RuntimeError("can't start new thread")
        start(thread)

    with manager_of(tmp_path, handler_of()) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        with monkeypatch.context() as patch:
            patch.setattr(writer.Writer, "__init__", opening)
            patch.setattr(threading.Thread, "start", out_of_threads)
            with pytest.raises(SaveError, match="new thread"):
                save(manager, 2, state)
        assert_unharmed(manager, tmp_path, {1: wanted})
        assert_next_save_works(manager, tmp_path, {1: wanted}, state, wanted)


def test_a_save_has_failed_before_its_threads_hear_that_no_more_comes(tmp_path, mesh, monkeypatch):
    """Else the writer might finish the item without what is missing, and hide the cause."""
    state, over, holding = make_state(mesh), [], []

    class Slabs(queue.SimpleQueue):
        def put(self, item):
            if item is None:
                (save_of_it,) = holding
                over.append(save_of_it.is_over)
            super().put(item)

    def snapshot(self, arrays):
        holding.append(self)
        self._holding.on_device = Slabs()
        original(self, arrays)

    original = Save.snapshot
    with manager_of(tmp_path, handler_of()) as manager:
        with monkeypatch.context() as patch, failing_at("copy"):
            patch.setattr(Save, "snapshot", snapshot)
            with pytest.raises(SaveError) as caught:
                save(manager, 2, state)
        assert isinstance(caught.value.__cause__, Boom)
    assert over == [True]


@pytest.mark.parametrize("told_by", ["wait", "save", "close"])
def test_who_is_told(tmp_path, mesh, told_by):
    state = make_state(mesh)
    manager = manager_of(tmp_path, handler_of())
    save(manager, 1, state)
    within(manager.wait_until_finished)
    with failing_at("wait"), held_at("wait") as gate:
        save(manager, 2, state)
        gate.opened.set()
        join_threads("lazy_orbax", "async_save")
        with pytest.raises(SaveError) as caught:
            if told_by == "wait":
                within(manager.wait_until_finished)
            elif told_by == "save":
                save(manager, 3, state)
            else:
                within(manager.close)
    assert_told(caught.value, 2)
    if told_by != "close":
        # Told once: nothing is raised again.
        within(manager.wait_until_finished)
        manager.check_for_errors()
        wanted = Steps(state).bytes_of(state)
        assert_next_save_works(manager, tmp_path, {1: wanted}, state, wanted)
        within(manager.close)
    assert HOST_BUDGET.in_flight_bytes == 0


def test_the_failed_step_may_be_saved_again(tmp_path, mesh):
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    with manager_of(tmp_path, handler_of()) as manager:
        with failing_at("finish"), pytest.raises(SaveError):
            save(manager, 1, state)
            within(manager.wait_until_finished)
        save(manager, 1, state)
        within(manager.wait_until_finished)
        assert_unharmed(manager, tmp_path, {1: wanted})


@pytest.mark.parametrize("place", ["open", "hand over", "finish"])
@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_a_writer_that_fails_before_save_returned_publishes_nothing(
    tmp_path, mesh, monkeypatch, place, use_ocdbt
):
    """The writer may be faster than the training thread, which compiles at its first save."""
    state = make_state(mesh)["small"]
    failed = threading.Event()
    options = {"on_timeline": lambda timeline: failed.set()}
    take = device_to_host.take

    def slow_take(*args):
        held = take(*args)
        if place == "open":
            assert failed.wait(30)
        return held

    note = lazy_orbax.timeline.Recorder.note

    def slow_note(self, **facts):
        if "bytes_written" in facts:
            assert failed.wait(30)
        note(self, **facts)

    monkeypatch.setattr(device_to_host, "take", slow_take)
    monkeypatch.setattr(lazy_orbax.timeline.Recorder, "note", slow_note)
    with manager_of(tmp_path, handler_of(options=options, use_ocdbt=use_ocdbt)) as manager:
        with failing_at(place), pytest.raises(SaveError) as caught:
            save(manager, 2, state)
            within(manager.wait_until_finished)
        assert_told(caught.value, 2)
        assert manager.all_steps() == []


@pytest.mark.parametrize(
    ("place", "mode"),
    rotated(["to the host", "views", "hand over", "wait", "finish", "sync"], MODES),
    indirect=["mode"],
)
def test_a_stage_that_hangs_stops_nobody(tmp_path, mesh, mode, place, request):
    state = make_state(mesh)
    steps = Steps(state)
    with manager_of(tmp_path, handler_of(mode)) as manager:
        wanted = steps.bytes_of(state)
        with held_at(place) as gate:
            save(manager, 1, state)
            gate.await_call()
            for _ in range(3):
                state = steps.donating(state)
            jax.block_until_ready(state)
            assert manager.latest_step() != 1 or not os.path.exists(tmp_path / "1")
            if place == "to the host" and "accelerator" in request.node.name:
                with pytest.raises(TimeoutError, match=r"0\.01 s"):
                    lazy_orbax.wait_until_staged(0.01)
            elif place in ("finish", "sync"):
                within(lazy_orbax.wait_until_staged)
            gate.opened.set()
            within(manager.wait_until_finished)
        within(lazy_orbax.wait_until_staged)
        assert_unharmed(manager, tmp_path, {1: wanted})


@pytest.mark.parametrize("mode", ["accelerator"], indirect=True)
def test_a_failure_is_raised_by_wait_until_staged_and_then_forgotten(
    tmp_path, mesh, mode, monkeypatch
):
    entered, wait = threading.Event(), Save.wait_until_staged

    def enter_and_wait(self, timeout_s):
        entered.set()
        wait(self, timeout_s)

    monkeypatch.setattr(Save, "wait_until_staged", enter_and_wait)
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    with manager_of(tmp_path, handler_of(mode)) as manager:
        with failing_at("to the host"), held_at("to the host") as gate:
            save(manager, 2, state)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(lazy_orbax.wait_until_staged, 30)
                # Waiting before it fails: after that Orbax's thread may be told first.
                assert entered.wait(30)
                gate.opened.set()
                with pytest.raises(SaveError) as caught:
                    waiting.result(30)
            assert_told(caught.value, 2)
            with pytest.raises(SaveError):
                within(manager.wait_until_finished)
        save(manager, 3, state)
        within(lazy_orbax.wait_until_staged)
        within(manager.wait_until_finished)
        assert_unharmed(manager, tmp_path, {3: wanted})


def test_a_failure_that_save_raised_is_not_raised_by_wait_until_staged(tmp_path, mesh):
    state = make_state(mesh)
    with manager_of(tmp_path, handler_of()) as manager:
        with failing_at("copy", call=2), pytest.raises(Exception, match="no luck") as caught:
            save(manager, 2, state)
        assert caught.value is not None  # Kept, as a training loop may keep it.
        within(lazy_orbax.wait_until_staged)


@pytest.mark.parametrize("place", ["to the host", "views", "wait", "finish"])
def test_an_error_that_is_kept_keeps_no_host_memory(tmp_path, mesh, mode, monkeypatch, place):
    state = make_state(mesh)
    alive = []
    to_host = device_to_host.to_host

    def seen(held):
        held = to_host(held)
        alive.extend(weakref.ref(array) for array in held.arrays)
        return held

    monkeypatch.setattr(device_to_host, "to_host", seen)
    with manager_of(tmp_path, handler_of(mode)) as manager:
        call = 1 if place == "finish" else 2
        with failing_at(place, call=call), held_at(place, call=call) as gate:
            save(manager, 2, state)
            gate.opened.set()
            with pytest.raises(SaveError) as caught:
                within(manager.wait_until_finished)
        assert alive
        join_threads("lazy_orbax", "async_save", "save_finalize")
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
    assert_told(caught.value, 2)


# Real faults of the storage.


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_a_file_that_cannot_grow(tmp_path, mesh, mode, use_ocdbt):
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    with manager_of(tmp_path, handler_of(mode, use_ocdbt=use_ocdbt)) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            with pytest.raises(SaveError) as caught:
                save(manager, 2, state)
                within(manager.wait_until_finished)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_told(caught.value, 2)
        assert os.strerror(errno.EFBIG) in str(caught.value)
        assert caught.value.leaf
        assert caught.value.file
        if not use_ocdbt:
            assert caught.value.file.startswith(str(tmp_path))
            # Only its chunks are larger than the limit.
            assert caught.value.leaf == "large"
            assert "/large/" in caught.value.file
        assert_unharmed(manager, tmp_path, {1: wanted})
        assert_next_save_works(manager, tmp_path, {1: wanted}, state, wanted)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB, or a skip where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


def test_a_full_disk(small_disk, mesh, mode):
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    with manager_of(small_disk, handler_of(mode)) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        with pytest.raises(SaveError) as caught:
            save(manager, 2, state)
            within(manager.wait_until_finished)
        assert_told(caught.value, 2)
        assert os.strerror(errno.ENOSPC) in str(caught.value)
        assert_unharmed(manager, small_disk, {1: wanted})
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True, timeout=30)
        assert_next_save_works(manager, small_disk, {1: wanted}, state, wanted)


# The host budget.


def quarter(state):
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return max(n_bytes // 4, 2**20)


def test_a_budget_of_a_quarter_of_the_state(tmp_path, mesh, mode, request):
    state = make_state(mesh)
    steps = Steps(state)
    lines = []
    options = {"host_bytes": quarter(state), "on_timeline": lines.append}
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    HOST_BUDGET._peak_bytes = 0
    wanted = {}
    with manager_of(tmp_path, handler_of(mode, options=options)) as manager:
        for step in (1, 2):
            wanted[step] = steps.bytes_of(state)
            save(manager, step, state)
            state = steps.donating(state)
            within(manager.wait_until_finished)
        assert_unharmed(manager, tmp_path, wanted)
    assert HOST_BUDGET.peak_bytes <= max(quarter(state), largest)
    assert [line.error for line in lines] == [None, None]
    assert all(line.waited_s > 0 for line in lines)


def only_packed(state):
    """The leaves that staging packs: their copies wait on the device, not in `save()`."""
    return {name: state[name] for name in ("large", "columns", "rows", "half", "small")}


@pytest.mark.parametrize("mode", ["direct", "stage"])
def test_save_waits_for_memory_only_while_there_is_none(tmp_path, mesh, mode, monkeypatch):
    waiting = observe_waiting(monkeypatch)
    state = only_packed(make_state(mesh))
    lines = []
    options = {"host_bytes": quarter(state), "on_timeline": lines.append}
    with manager_of(tmp_path, handler_of(mode, options=options)) as manager:
        with held_at("wait") as gate:
            saver = threading.Thread(
                target=manager.save, args=(1,), kwargs={"args": ocp.args.StandardSave(state)}
            )
            saver.start()
            gate.await_call()
            assert waiting.wait(30)
            saver.join(0.2)
            assert saver.is_alive()
            gate.opened.set()
            saver.join(30)
            assert not saver.is_alive()
            within(manager.wait_until_finished)
        assert lines[0].waited_s > 0.2
        assert_unharmed(manager, tmp_path, {1: Steps(state).bytes_of(state)})


def test_save_of_what_is_staged_on_the_device_waits_for_no_memory(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    state = only_packed(make_state(mesh))
    steps = Steps(state)
    wanted = steps.bytes_of(state)
    options = {"host_bytes": quarter(state)}
    with manager_of(tmp_path, handler_of("stage", options=options)) as manager:
        with held_at("wait") as gate:
            save(manager, 1, state)
            state = steps.donating(state)
            gate.await_call()
            gate.opened.set()
            within(manager.wait_until_finished)
        assert_unharmed(manager, tmp_path, {1: wanted})


def observe_waiting(monkeypatch):
    """Returns an event that is set when a reservation has to wait."""
    waiting = threading.Event()
    reserve = HOST_BUDGET.reserve

    def observed(n_bytes, *, limit_bytes, aborted, kind=None):
        def asked():
            # Asked first before it waits at all, and again on every change.
            if HOST_BUDGET.in_flight_bytes and HOST_BUDGET.in_flight_bytes + n_bytes > limit_bytes:
                waiting.set()
            return aborted()

        return reserve(n_bytes, limit_bytes=limit_bytes, aborted=asked, kind=kind)

    monkeypatch.setattr(HOST_BUDGET, "reserve", observed)
    return waiting


@pytest.mark.parametrize("place", ["open", "views", "wait"])
@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_a_failure_ends_the_wait_for_memory(tmp_path, mesh, mode, monkeypatch, place):
    waiting = observe_waiting(monkeypatch)
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    options = {"host_bytes": SLAB_BYTES}
    with manager_of(tmp_path, handler_of(mode, options=options)) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        waiting.clear()
        with failing_at(place), held_at(place) as gate:
            opener = threading.Thread(target=lambda: waiting.wait(30) and gate.opened.set())
            opener.start()
            with pytest.raises(SaveError) as caught:
                save(manager, 2, state)
            opener.join(30)
        assert_told(caught.value, 2)
        assert isinstance(caught.value.__cause__, Boom)
        assert_unharmed(manager, tmp_path, {1: wanted})
        assert_next_save_works(manager, tmp_path, {1: wanted}, state, wanted)


@pytest.mark.parametrize("handlers", ["one", "two"])
def test_two_items_share_a_budget_smaller_than_either(tmp_path, mesh, mode, handlers):
    state = make_state(mesh)
    steps = Steps(state)
    options = {"host_bytes": SLAB_BYTES}
    one = handler_of(mode, options=options)
    two = one if handlers == "one" else handler_of(mode, options=options)
    with manager_of(tmp_path, {"a": one, "b": two}) as manager:
        for step in (1, 2):
            wanted = steps.bytes_of(state)
            items = {"a": ocp.args.StandardSave(state), "b": ocp.args.StandardSave(state)}
            within(manager.save, step, args=ocp.args.Composite(**items))
            state = steps.donating(state)
            within(manager.wait_until_finished)
            found = manager.restore(
                step,
                args=ocp.args.Composite(a=ocp.args.StandardRestore(), b=ocp.args.StandardRestore()),
            )
            assert_same(found.a, wanted)
            assert_same(found.b, wanted)
    assert HOST_BUDGET.in_flight_bytes == 0


def test_one_item_fails_and_the_other_does_not(tmp_path, mesh, mode):
    state = make_state(mesh)
    with manager_of(tmp_path, {"a": handler_of(mode), "b": handler_of(mode)}) as manager:
        items = {
            "a": ocp.args.StandardSave({"x": np.arange(4.0)}),
            "b": ocp.args.StandardSave(state),
        }
        with failing_at("views", call=2), pytest.raises(SaveError) as caught:
            within(manager.save, 1, args=ocp.args.Composite(**items))
            within(manager.wait_until_finished)
        assert_told(caught.value, 1)
        join_threads("lazy_orbax", "async_save")
        await_budget()
        assert manager.all_steps() == []
        within(manager.save, 2, args=ocp.args.Composite(**items))
        within(manager.wait_until_finished)
        assert manager.all_steps() == [2]


@pytest.mark.parametrize("asynchronously", [True, False])
@pytest.mark.parametrize("how", ["deleted", "copy fails"])
def test_the_second_item_cannot_be_saved(tmp_path, mesh, mode, how, asynchronously):
    """Orbax drops the first item's save without a word: its memory must come back all the same."""
    state = make_state(mesh)
    bad = {"y": jax.numpy.ones(3)}
    async_options = ocp.AsyncOptions(create_directories_asynchronously=asynchronously)
    handlers = {"a": handler_of(mode), "b": handler_of(mode)}
    with manager_of(tmp_path, handlers, async_options=async_options) as manager:
        good = {"a": ocp.args.StandardSave(state), "b": ocp.args.StandardSave(bad)}
        n_slabs = count_slabs(tmp_path / "elsewhere", state, mode)
        if how == "deleted":
            bad["y"].delete()
            with pytest.raises(lazy_orbax.errors.DeletedArrayError):
                within(manager.save, 1, args=ocp.args.Composite(**good))
        else:
            with failing_at("copy", call=n_slabs + 1), pytest.raises(SaveError):
                within(manager.save, 1, args=ocp.args.Composite(**good))
        join_threads("lazy_orbax")
        await_budget()
        assert manager.all_steps() == []
        good["b"] = ocp.args.StandardSave({"y": jax.numpy.ones(3)})
        within(manager.save, 2, args=ocp.args.Composite(**good))
        within(manager.wait_until_finished)
        assert manager.all_steps() == [2]
    assert HOST_BUDGET.in_flight_bytes == 0


def count_slabs(path, state, mode):
    """Returns how many slabs the plan of `state` has."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        take = device_to_host.take
        patch.setattr(device_to_host, "take", lambda *args: calls.append(1) or take(*args))
        with ocp.AsyncCheckpointer(handler_of(mode)) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(state))
    return len(calls)
