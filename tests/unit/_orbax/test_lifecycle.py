"""What is known of Orbax's inside, asked of the Orbax that is installed: it may change any day."""

import asyncio
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lazy_orbax._orbax import lifecycle, waiting
from lazy_orbax._orbax.symbols import MISFITS

WAIT_S = 30
TREE = {"w": np.arange(8)}


class Gate:
    """A future that holds Orbax's commit thread, and notes what can be seen from there."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()
        self.seen = {}

    def result(self, timeout=None):
        del timeout
        self.seen["thread"] = threading.current_thread().name
        self.seen["may be publishing"] = lifecycle.may_be_publishing()
        self.reached.set()
        assert self.opened.wait(WAIT_S)


@pytest.fixture
def gate(monkeypatch):
    """Holds every save of stock Orbax's in its commit thread."""
    gate, save = Gate(), ocp.PyTreeCheckpointHandler.async_save

    async def held(self, *args, **keywords):
        return [*(await save(self, *args, **keywords)), gate]

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", held)
    yield gate
    gate.opened.set()


def test_the_threads_in_which_orbax_publishes_and_waits_have_these_names(tmp_path, gate):
    with ocp.CheckpointManager(tmp_path) as manager:
        assert not lifecycle.may_be_publishing()
        manager.save(1, args=ocp.args.PyTreeSave(TREE))
        assert gate.reached.wait(WAIT_S)
        names = {thread.name for thread in threading.enumerate()}
        assert {lifecycle.COMMIT_THREAD, lifecycle.MANAGER_THREAD} <= names
        gate.opened.set()
        manager.wait_until_finished()
    assert gate.seen == {"thread": lifecycle.COMMIT_THREAD, "may be publishing": True}


@pytest.mark.parametrize("kind", ["manager", "AsyncCheckpointer", "Checkpointer"])
def test_orbax_reports_that_it_published_once_it_did_and_in_the_same_thread(tmp_path, kind):
    seen = []

    def note(event, duration_secs, **_):
        if event in lifecycle.PUBLISHED_EVENTS:
            listed = (tmp_path / "run" / "1").is_dir()
            seen.append((listed, threading.current_thread().name))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        if kind == "manager":
            with ocp.CheckpointManager(tmp_path / "run") as manager:
                manager.save(1, args=ocp.args.PyTreeSave(TREE))
        else:
            with getattr(ocp, kind)(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(tmp_path / "run" / "1", args=ocp.args.PyTreeSave(TREE))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    thread = "MainThread" if kind == "Checkpointer" else lifecycle.COMMIT_THREAD
    assert seen
    assert seen[0] == (True, thread)


def test_directories_that_orbax_has_begun_to_create_are_seen_by_their_signals(
    tmp_path, monkeypatch
):
    begun, opened, found = threading.Event(), threading.Event(), []
    save = ocp.PyTreeCheckpointHandler.async_save
    create = ocp.path.atomicity.AtomicRenameTemporaryPath.create

    async def late(self, *args, **keywords):
        begun.set()
        assert await asyncio.to_thread(opened.wait, WAIT_S)
        return await create(self, *args, **keywords)

    async def looking(self, *args, **keywords):
        operation = lifecycle.operation_id()
        found.append(waiting.promised_directories(operation))
        opened.set()
        deadline_s = time.monotonic() + WAIT_S
        while waiting.promised_directories(operation) and time.monotonic() < deadline_s:
            await asyncio.sleep(0)
        found.append(waiting.promised_directories(operation))
        return await save(self, *args, **keywords)

    monkeypatch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "create", late)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", looking)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(TREE))
        manager.wait_until_finished()
    assert begun.is_set()
    promised, left = found
    assert promised
    assert left == []


def test_the_manager_that_saves_is_in_the_frames_of_its_handler(tmp_path, monkeypatch):
    found, save = [], ocp.PyTreeCheckpointHandler.async_save

    async def looking(self, *args, **keywords):
        found.append(lifecycle.manager_that_saves())
        return await save(self, *args, **keywords)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", looking)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(TREE))
        manager.wait_until_finished()
        assert found == [manager]
    assert lifecycle.manager_that_saves() is None


def test_a_manager_says_which_steps_it_will_remove(tmp_path):
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, args=ocp.args.PyTreeSave(TREE))
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert lifecycle.retired_steps(manager) == [1, 2]


@pytest.mark.parametrize(
    ("handler_of", "words"),
    [*zip((ocp.PyTreeCheckpointHandler, ocp.StandardCheckpointHandler), MISFITS, strict=True)],
)
def test_orbax_says_in_these_words_that_trees_differ(handler_of, words, tmp_path):
    other = {name: jax.ShapeDtypeStruct((8,), np.int64) for name in "vw"}
    with ocp.Checkpointer(handler_of()) as checkpointer:
        checkpointer.save(tmp_path / "1", TREE)
        with pytest.raises(ValueError, match=words):
            checkpointer.restore(tmp_path / "1", other)
