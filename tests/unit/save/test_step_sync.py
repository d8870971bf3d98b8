"""What is synced of a published step, and when."""

import contextlib
import errno
import os
import pathlib
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import join_threads, within
from equipment.trees import assert_same, on_mesh
from jax._src import monitoring
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax.errors import NotDurableError, OptionError, SaveError
from lazy_orbax.handlers.v1 import lazy_v1
from lazy_orbax.save import process_end
from lazy_orbax.storage import fsync


class Synced:
    """Which files and directories were synced, in which version; may refuse to."""

    def __init__(self):
        self.versions, self.refused = set(), None

    def fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.refused is not None and self.refused(path):
            raise OSError(errno.EIO, "the disk is gone", path)
        self.versions.add(version(descriptor))

    def missing(self, root):
        """Returns what below `root`, and above it, changed after it was synced."""
        paths = [root, *root.rglob("*")]
        while not os.path.ismount(root):
            root = root.parent
            paths.append(root)
        shared = pathlib.Path(tempfile.gettempdir())  # Others make files there meanwhile.
        return {str(p) for p in paths if p != shared and version(p) not in self.versions}


def version(path_or_descriptor):
    found = os.stat(path_or_descriptor)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


@contextlib.contextmanager
def refusing(synced, name):
    synced.refused = lambda path: os.path.basename(path) == name
    yield
    synced.refused = None


@pytest.fixture
def synced(monkeypatch):
    noted = Synced()
    monkeypatch.setattr(fsync.os, "fsync", noted.fsync)
    return noted


@pytest.fixture
def state(mesh):
    return {
        "w": on_mesh(np.arange(64, dtype=np.float32).reshape(8, 8), mesh, "a", "b"),
        "n": np.arange(5),
        "step": 3,
    }


def by_manager(root, state, **options):
    options = ocp.CheckpointManagerOptions(**options)
    handlers = {"state": lazy_orbax.standard_handler(), "data": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(root, item_handlers=handlers, options=options) as manager:
        args = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave({"at": 7})}
        manager.save(1, args=ocp.args.Composite(**args), metrics={"loss": 0.5})
        within(manager.wait_until_finished)
        yield manager


def by_manager_with_durable_path(root, state):
    yield from by_manager(root, state, temporary_path_class=lazy_orbax.DurablePath)


def by_manager_at_once(root, state):
    yield from by_manager(root, state, enable_async_checkpointing=False)


def by_async_checkpointer(root, state):
    with ocp.AsyncCheckpointer(lazy_orbax.standard_handler()) as checkpointer:
        checkpointer.save(root / "x" / "1", args=ocp.args.StandardSave(state))
        within(checkpointer.wait_until_finished)
        yield checkpointer


def by_checkpointer(root, state):
    with ocp.Checkpointer(lazy_orbax.pytree_handler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(root / "x" / "1", args=ocp.args.PyTreeSave(state))
        yield checkpointer


def by_function_of_v1(root, state):
    undo = lazy_v1()
    v1.save_checkpointables(root / "x" / "1", {"state": state, "data": {"at": 7}})
    undo()
    yield


def by_checkpointer_of_v1(root, state):
    undo = lazy_v1()
    with v1.training.Checkpointer(root) as checkpointer:
        checkpointer.save_checkpointables(1, {"state": state, "data": {"at": 7}})
        undo()
        yield


def test_v1_tells_of_a_step_that_is_listed_and_not_durable(tmp_path, state, synced):
    undo = lazy_v1()
    synced.refused = lambda path: path == str(tmp_path)
    with pytest.raises(NotDurableError, match="the disk is gone"):
        v1.save(tmp_path / "1", state)
    undo()
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize("way", ["save", "Checkpointer"])
def test_a_step_of_v1_whose_metadata_cannot_be_synced_is_not_listed(tmp_path, state, synced, way):
    undo = lazy_v1()
    run = v1.training.Checkpointer(tmp_path) if way == "Checkpointer" else None
    save = run.save_async if run else lambda n, tree: v1.save_async(tmp_path / f"{n}", tree)
    gone = pytest.raises(SaveError, match="the disk is gone")
    with refusing(synced, "_CHECKPOINT_METADATA"), gone as caught:
        save(1, state).result()
    assert not isinstance(caught.value, NotDurableError)
    assert "1" not in os.listdir(tmp_path)
    if run:
        with pytest.raises(SaveError):
            run.close()  # Orbax tells of it once more.
    v1.save(tmp_path / "2", state)
    undo()
    assert os.listdir(tmp_path) == ["2"]


@pytest.mark.parametrize(
    "save",
    [
        by_manager,
        by_manager_with_durable_path,
        by_manager_at_once,
        by_async_checkpointer,
        by_checkpointer,
        by_function_of_v1,
        by_checkpointer_of_v1,
    ],
)
def test_what_is_finished_is_synced_from_the_chunks_to_the_root(tmp_path, state, synced, save):
    root = tmp_path / "new" / "run"
    for _ in save(root, state):
        # A manager's own files that are of no step: Orbax writes them when it likes.
        own = {str(path) for path in root.glob("descriptor*")}
        assert synced.missing(root) - own == set()
        assert any(root.rglob("_CHECKPOINT_METADATA"))


@pytest.mark.parametrize("save", [by_manager, by_manager_with_durable_path, by_async_checkpointer])
def test_it_is_synced_below_a_directory_that_is_called_temporary(tmp_path, state, synced, save):
    test_what_is_finished_is_synced_from_the_chunks_to_the_root(
        tmp_path / "x.orbax-checkpoint-tmp", state, synced, save
    )


@pytest.mark.parametrize("durable_path", [{}, {"temporary_path_class": lazy_orbax.DurablePath}])
def test_it_is_synced_in_a_run_that_is_called_temporary(tmp_path, state, synced, durable_path):
    root = tmp_path / "run.orbax-checkpoint-tmp"
    for _ in by_manager(root, state, **durable_path):
        own = {str(path) for path in root.glob("descriptor*")}
        assert synced.missing(root) - own == set()


def test_stock_orbax_leaves_much_of_it_unsynced(tmp_path, state, synced):
    # The test above can fail: what it looks for is there to be missed.
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    missing = synced.missing(tmp_path / "run")
    step = tmp_path / "run" / "1"
    assert {str(step), str(step / "_CHECKPOINT_METADATA")} <= missing


@pytest.mark.parametrize("save", [by_manager, by_manager_with_durable_path])
def test_what_is_durable_before_orbax_lists_the_step(tmp_path, state, synced, save, monkeypatch):
    root, missing = tmp_path / "run", []
    renamed = os.rename

    def rename(source, target, **keywords):
        if str(target) == str(root / "1"):
            found = [path for path in synced.missing(root / source) if path > str(root)]
            missing.extend(os.path.basename(path) for path in found)
        return renamed(source, target, **keywords)

    monkeypatch.setattr(os, "rename", rename)
    for _ in save(root, state):
        pass
    # Orbax writes them directly before it renames. Stock Orbax does not read the commit file here.
    late = {"commit_success.txt", "1.orbax-checkpoint-tmp"}
    if save is by_manager:
        late |= {"_CHECKPOINT_METADATA", "data", "state", "metrics"}
    assert "_CHECKPOINT_METADATA" in missing or save is by_manager_with_durable_path
    assert set(missing) <= late


@pytest.mark.parametrize("durable_path", [False, True])
@pytest.mark.parametrize("at", ["the item", "the step", "the run"])
def test_a_storage_that_refuses_to_sync(tmp_path, state, synced, at, durable_path):
    root = tmp_path / "run"
    refused = {
        "the item": lambda path: path.endswith("/manifest.ocdbt") and "process_" not in path,
        "the step": lambda path: path.endswith("/_CHECKPOINT_METADATA"),
        "the run": lambda path: path == str(root) and (root / "2").exists(),
    }[at]
    keywords = {"temporary_path_class": lazy_orbax.DurablePath} if durable_path else {}
    options = ocp.CheckpointManagerOptions(**keywords)
    handler, timelines = (
        lazy_orbax.standard_handler(
            options=lazy_orbax.LazyOptions(on_timeline=lambda t: timelines.append(t))
        ),
        [],
    )
    with ocp.CheckpointManager(root, item_handlers=handler, options=options) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        within(manager.wait_until_finished)
        synced.refused = refused
        manager.save(2, args=ocp.args.StandardSave(state))
        with pytest.raises(SaveError, match="the disk is gone") as raised:
            within(manager.wait_until_finished)
        synced.refused = None
        assert raised.value.step == 2
        published = at == "the run"
        assert isinstance(raised.value, NotDurableError) == published
        assert (root / "2").exists() == published
        assert ("is listed" in str(raised.value)) == published
        manager.save(3, args=ocp.args.StandardSave(state))
        within(manager.wait_until_finished)
        assert synced.missing(root / "3") == set()
        assert_same(jax.tree.map(np.asarray, manager.restore(3)), jax.tree.map(np.asarray, state))
    assert [t.step for t in timelines] == [1, 2, 3]
    assert [t.error is None for t in timelines] == [True, False, True]
    assert timelines[1].committed_s is None


def test_a_durable_path_serves_stock_handlers(tmp_path, synced):
    options = ocp.CheckpointManagerOptions(temporary_path_class=lazy_orbax.DurablePath)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": np.arange(4)}))
        within(manager.wait_until_finished)
        assert manager.all_steps() == [1]
    step = tmp_path / "run" / "1"
    late = {str(step / "commit_success.txt"), str(step)}  # Nobody reads it in a local directory.
    missing = synced.missing(step) - late
    # What TensorStore syncs, which the test does not see.
    assert {path for path in missing if "/ocdbt.process_0" not in path} == set()


def test_a_durable_path_is_for_local_directories():
    with pytest.raises(OptionError, match="gs://bucket/run/1"):
        lazy_orbax.DurablePath.from_final("gs://bucket/run/1")


def test_a_run_below_a_directory_that_cannot_be_read(tmp_path, state, synced, monkeypatch):
    above = tmp_path / "above"
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != str(above) and allowed(path, mode)
    )
    for _ in by_manager(above / "run", state):
        assert synced.missing(above / "run" / "1") == {str(above)}


# Who else uses JAX's monitoring may clear all listeners: Orbax's report is heard all the same.


@pytest.fixture
def listeners():
    """Puts back what a test clears."""
    kept = monitoring.get_event_duration_listeners()
    yield monitoring
    for listener in set(kept) - set(monitoring.get_event_duration_listeners()):
        jax.monitoring.register_event_duration_secs_listener(listener)


def save_to(manager, step, state):
    manager.save(step, args=ocp.args.StandardSave({**state, "step": step}))
    within(manager.wait_until_finished)


def test_every_step_is_synced_after_the_listeners_were_cleared(tmp_path, state, synced, listeners):
    timelines = []
    options = lazy_orbax.LazyOptions(on_timeline=timelines.append)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for step in range(1, 5):
            save_to(manager, step, state)
            assert synced.missing(tmp_path / str(step)) == set()
            jax.monitoring.clear_event_listeners()
    assert [(t.step, t.committed_s is not None) for t in timelines] == [
        (step, True) for step in range(1, 5)
    ]


def test_there_is_one_listener_however_many_saves_there_are(tmp_path, state, listeners):
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.standard_handler()) as manager:
        save_to(manager, 1, state)
        listening = listeners.get_event_duration_listeners()
        for step in (2, 3):
            save_to(manager, step, state)
        assert listeners.get_event_duration_listeners() == listening
        jax.monitoring.clear_event_listeners()
        save_to(manager, 4, state)
        assert len(listeners.get_event_duration_listeners()) == 1


@pytest.fixture
def cleared_at_publication(monkeypatch, listeners):
    """Clears the listeners as a step is renamed: after they were looked at, before the report."""
    renamed, cleared = os.rename, []

    def rename(source, target, **keywords):
        if os.path.basename(target) == "2":
            jax.monitoring.clear_event_listeners()
            cleared.append(str(target))
        return renamed(source, target, **keywords)

    monkeypatch.setattr(os, "rename", rename)
    return cleared


def manager_of(path, timelines, *, in_background):
    options = lazy_orbax.LazyOptions(on_timeline=timelines.append)
    return ocp.CheckpointManager(
        path,
        item_handlers=lazy_orbax.standard_handler(options=options),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=in_background),
    )


@pytest.mark.parametrize("when", ["the next save", "close", "the end"])
def test_a_publication_that_nobody_heard_of_is_synced_by_the_next_call(
    tmp_path, state, synced, cleared_at_publication, caplog, when
):
    """Where it was the caller's thread that published."""
    timelines = []
    with manager_of(tmp_path, timelines, in_background=False) as manager:
        save_to(manager, 1, state)
        save_to(manager, 2, state)
        assert cleared_at_publication
        assert str(tmp_path / "2") in synced.missing(tmp_path / "2"), "the event was heard"
        if when == "the next save":
            save_to(manager, 3, state)
        elif when == "the end":
            process_end._finish()
        if when != "close":
            assert synced.missing(tmp_path / "2") == set()
    assert synced.missing(tmp_path / "2") == set()
    assert [t.step for t in timelines] == ([1, 2, 3] if when == "the next save" else [1, 2])
    assert all(t.error is None and t.committed_s is not None for t in timelines)
    assert_warned(caplog, tmp_path / "2")


def assert_warned(caplog, step):
    (warned,) = [r.getMessage() for r in caplog.records if r.name == "lazy_orbax"]
    assert "clear_event_listeners" in warned
    assert str(step) in warned


def test_a_publication_that_nobody_heard_of_is_synced_though_nobody_calls(
    tmp_path, state, synced, cleared_at_publication, caplog
):
    timelines = []
    with manager_of(tmp_path, timelines, in_background=True) as manager:
        save_to(manager, 1, state)
        save_to(manager, 2, state)
        assert cleared_at_publication
        join_threads("lazy_orbax-publish")
        assert synced.missing(tmp_path / "2") == set()
        assert [t.step for t in timelines] == [1, 2]
    assert all(t.error is None and t.committed_s is not None for t in timelines)
    assert_warned(caplog, tmp_path / "2")


@pytest.mark.parametrize("when", ["the next save", "close"])
@pytest.mark.parametrize("in_background", [True, False])
def test_a_publication_that_nobody_heard_of_and_that_cannot_be_synced_any_more(
    tmp_path, state, synced, cleared_at_publication, when, in_background
):
    timelines = []
    manager = manager_of(tmp_path, timelines, in_background=in_background)
    save_to(manager, 1, state)
    # What is synced before the publication is let through.
    synced.refused = lambda path: bool(cleared_at_publication)
    save_to(manager, 2, state)
    assert cleared_at_publication
    join_threads("lazy_orbax-publish")
    with pytest.raises(NotDurableError, match="the disk is gone") as raised:
        if when == "close":
            manager.close()
        else:
            manager.save(3, args=ocp.args.StandardSave(state))
    synced.refused = None
    assert raised.value.step == 2
    assert timelines[1].error is raised.value
    if when == "the next save":
        save_to(manager, 3, state)
        assert synced.missing(tmp_path / "3") == set()
    manager.close()
    assert [t.step for t in timelines] == ([1, 2] if when == "close" else [1, 2, 3])
