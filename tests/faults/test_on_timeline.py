"""What `on_timeline` may do, and what it may not: the save that it is told of ends all the same."""

import logging
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import within
from equipment.trees import assert_same, on_mesh

import lazy_orbax
from lazy_orbax import timeline
from lazy_orbax.errors import OptionError


@pytest.fixture
def state(mesh):
    return {"w": on_mesh(np.arange(64, dtype=np.float32).reshape(8, 8), mesh, "a", "b")}


class Told:
    """An `on_timeline` that calls `do` once, and keeps what that returned or raised."""

    def __init__(self, do):
        self.do, self.results, self.steps = do, [], []
        self.ended = threading.Event()

    def __call__(self, timeline):
        self.steps.append(timeline.step)
        if self.results:
            return
        self.results.append(None)
        try:
            self.results[0] = self.do()
        except BaseException as error:
            self.results[0] = error
            raise
        finally:
            self.ended.set()


def handler_of(on_timeline):
    return lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(on_timeline=on_timeline))


def save(manager, step, state):
    manager.save(step, args=ocp.args.StandardSave(state))


@pytest.mark.parametrize("how", ["save", "a subclass", "another manager", "wait"])
def test_on_timeline_that_saves_or_waits_is_refused_at_once(tmp_path, state, how, caplog):
    class Manager(ocp.CheckpointManager):
        def save(self, *args, **keywords):
            return super().save(*args, **keywords)

    def do():
        if how == "wait":
            manager.wait_until_finished()
        elif how == "another manager":
            with ocp.CheckpointManager(tmp_path / "other") as other:
                save(other, 1, {"n": 1})
        else:
            save(manager, 100, state)

    told = Told(do)
    cls = Manager if how == "a subclass" else ocp.CheckpointManager
    manager = cls(tmp_path / "run", item_handlers=handler_of(told))
    with caplog.at_level(logging.ERROR, logger="lazy_orbax"):
        save(manager, 1, state)
        within(manager.wait_until_finished)
    assert isinstance(told.results[0], OptionError)
    (logged,) = [r for r in caplog.records if r.name == "lazy_orbax"]
    assert str(tmp_path / "run" / "1") in logged.getMessage()
    assert "on_timeline" in str(logged.exc_info[1])
    assert "in the training loop" in str(logged.exc_info[1])
    within(lambda: save(manager, 2, {"w": state["w"] + 1}))
    within(manager.wait_until_finished)
    assert manager.all_steps() == [1, 2]
    assert told.steps == [1, 2]
    within(manager.close)


def test_on_timeline_of_an_async_checkpointer_that_saves_is_refused(tmp_path, state):
    told = Told(lambda: checkpointer.save(tmp_path / "2", args=ocp.args.StandardSave(state)))
    checkpointer = ocp.AsyncCheckpointer(handler_of(told))
    checkpointer.save(tmp_path / "1", args=ocp.args.StandardSave(state))
    within(checkpointer.wait_until_finished)
    assert isinstance(told.results[0], OptionError)
    within(checkpointer.close)
    assert not (tmp_path / "2").exists()


@pytest.fixture
def no_patience(monkeypatch):
    """A save does not wait for `on_timeline` at all."""
    monkeypatch.setattr(timeline, "_PATIENCE_S", 0.0)


@pytest.mark.usefixtures("no_patience")
def test_a_save_ends_though_on_timeline_does_not_return(tmp_path, state, caplog):
    gate = threading.Event()
    told = Told(lambda: gate.wait(30))
    with ocp.CheckpointManager(tmp_path, item_handlers=handler_of(told)) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        assert not told.ended.is_set()
        assert manager.all_steps() == [1]
        gate.set()
        assert told.ended.wait(30)
    (warned,) = [r.getMessage() for r in caplog.records if r.name == "lazy_orbax"]
    assert "on_timeline" in warned
    assert str(tmp_path / "1") in warned


@pytest.mark.usefixtures("no_patience")
def test_on_timeline_may_restore_what_was_committed(tmp_path, state):
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    told = Told(lambda: manager.restore(1, args=ocp.args.StandardRestore(target)))
    with ocp.CheckpointManager(tmp_path, item_handlers=handler_of(told)) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        assert told.ended.wait(30)
        assert_same(told.results[0], state)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("a bug")])
def test_whatever_on_timeline_raises_a_committed_save_stays_committed(
    tmp_path, state, error, caplog
):
    def do():
        raise error

    with ocp.CheckpointManager(tmp_path, item_handlers=handler_of(Told(do))) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        assert manager.all_steps() == [1]
    (logged,) = [r for r in caplog.records if r.name == "lazy_orbax"]
    assert "on_timeline" in logged.getMessage()
    assert logged.exc_info[1] is error


@pytest.mark.usefixtures("no_patience")
def test_on_timeline_that_goes_on_after_it_was_refused_hangs_nobody(tmp_path, state):
    def do():
        with pytest.raises(OptionError):
            save(manager, 2, state)
        manager.wait_until_finished()
        return manager.all_steps()

    told = Told(do)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler_of(told)) as manager:
        save(manager, 1, state)
        within(manager.wait_until_finished)
        assert told.ended.wait(30)
    assert told.results == [[1]]
