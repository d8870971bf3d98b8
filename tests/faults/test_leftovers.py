"""What a failed save wrote is removed, and nothing else is."""

import gc
import logging
import os
import threading
import weakref

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import failing_at, held_at, join_threads, within
from equipment.trees import assert_same, on_mesh
from etils import epath
from faults.disks import temporary

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.recovery.attempt import attempt_at
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

MARK = ".orbax-checkpoint-tmp"


@pytest.fixture
def tree(mesh):
    return {"w": on_mesh(np.arange(64.0, dtype=np.float32).reshape(8, 8), mesh, "a")}


def items(tree, **others):
    saved = {"state": ocp.args.StandardSave(tree), **others}
    return ocp.args.Composite(**saved)


def manager_of(path, **options):
    handlers = {"state": lazy_orbax.standard_handler(), "other": lazy_orbax.standard_handler()}
    handlers["notes"] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(
        path, item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options)
    )


def failed_save(manager, step, args, error=SaveError):
    with pytest.raises(error):
        within(manager.save, step, args=args)
        within(manager.wait_until_finished)


def good_save(manager, step, args):
    within(manager.save, step, args=args)
    within(manager.wait_until_finished)


@pytest.mark.parametrize("place", ["open", "hand over", "wait", "finish", "sync"])
def test_it_is_gone_when_the_failure_is_raised(tmp_path, tree, place):
    with manager_of(tmp_path) as manager:
        good_save(manager, 1, items(tree))
        with failing_at(place):
            failed_save(manager, 2, items(tree))
        assert temporary(tmp_path) == []
        assert HOST_BUDGET.in_flight_bytes == 0
        good_save(manager, 2, items(tree))
        assert manager.all_steps() == [1, 2]


def test_an_item_that_was_still_written_is_stopped_and_removed(tmp_path, tree):
    timelines = []
    options = lazy_orbax.LazyOptions(on_timeline=timelines.append)
    handlers = {"a": lazy_orbax.standard_handler(options=options)}
    handlers["b"] = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        args = ocp.args.Composite(a=ocp.args.StandardSave(tree), b=ocp.args.StandardSave(tree))
        with held_at("hand over", call=2) as gate, failing_at("finish"):
            within(manager.save, 1, args=args)
            gate.await_call()
            gate.opened.set()
            with pytest.raises(SaveError):
                within(manager.wait_until_finished)
        assert temporary(tmp_path) == []
        join_threads("lazy_orbax")
        assert [timeline.error is not None for timeline in timelines] == [True, True]
        good_save(manager, 1, args)
        assert manager.all_steps() == [1]


def test_what_another_handler_failed_with_leaves_nothing_after_the_next_save(
    tmp_path, tree, monkeypatch
):
    """Orbax asks no more of an item of ours when it has heard of a failure before."""

    class Failing:
        def result(self, timeout=None):
            raise OSError("no luck")

    async def fail(self, directory, args):
        return [Failing()]

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", fail)
    handlers = {"a": ocp.JsonCheckpointHandler(), "state": lazy_orbax.standard_handler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        failed_save(manager, 1, items(tree, a=ocp.args.JsonSave({})), OSError)
        join_threads("lazy_orbax")
        assert temporary(tmp_path) != []
        good_save(manager, 2, items(tree))
        assert temporary(tmp_path) == []
        assert manager.all_steps() == [2]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("logs", [False, True])
def test_a_step_that_orbax_could_not_publish(tmp_path, tree, monkeypatch, step, logs):
    """The item is durable, and then a rename of Orbax fails."""
    rename = os.rename

    def refuse(source, target, **keywords):
        if str(target) == str(tmp_path / "1"):
            raise OSError("no luck")
        rename(source, target, **keywords)

    with manager_of(tmp_path) as manager:
        if logs:
            failed = lazy_orbax.log_failed_saves(manager)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuse)
            patch.setattr(os, "replace", refuse)
            if logs:
                good_save(manager, 1, items(tree))
                assert failed.count == 1
                assert temporary(tmp_path) == []
            else:
                failed_save(manager, 1, items(tree), OSError)
                assert temporary(tmp_path) != []
        assert manager.all_steps() == []
        good_save(manager, step, items(tree))
        assert temporary(tmp_path) == []
        assert manager.all_steps() == [step]


def test_save_that_raises_leaves_nothing(tmp_path, tree):
    with manager_of(tmp_path) as manager:
        args = items(tree, other=ocp.args.StandardSave(tree))
        with failing_at("copy", call=2), pytest.raises(SaveError):
            within(manager.save, 1, args=args)
        join_threads("lazy_orbax")
        assert HOST_BUDGET.in_flight_bytes == 0
        good_save(manager, 2, args)
        assert temporary(tmp_path) == []
        assert manager.all_steps() == [2]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path, tree):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    with manager_of(tmp_path / "run") as manager:
        with held_at("finish") as gate, failing_at("sync"):
            within(manager.save, 1, args=items(tree))
            gate.await_call()
            (tmp_path / "run" / f"1{MARK}" / "link").symlink_to(elsewhere)
            gate.opened.set()
            with pytest.raises(SaveError):
                within(manager.wait_until_finished)
        assert temporary(tmp_path) == []
        assert (elsewhere / "precious").read_text() == "x"


def test_a_directory_without_the_mark_is_left_alone(tmp_path, tree):
    handler = lazy_orbax.LazyCheckpointHandler()
    path = tmp_path / "mine" / "item"
    path.mkdir(parents=True)
    (path / "precious").write_text("x")
    with failing_at("finish"), pytest.raises(SaveError):
        within(handler.save, epath.Path(path), args=lazy_orbax.args.LazySave(tree))
    assert (path / "precious").exists()
    handler.close()


def test_a_directory_that_is_not_of_a_step_is_removed_only_when_it_is_empty(tmp_path):
    """Whoever names a directory of his own as Orbax names its temporary ones keeps it."""
    root = tmp_path / f"mine{MARK}"
    (root / f"5{MARK}").mkdir(parents=True)
    (root / "precious").write_text("x")
    attempt = attempt_at(str(root / f"5{MARK}"), "1", removes_all=True)
    assert not attempt.remove([str(root / f"5{MARK}")])
    assert os.listdir(root) == ["precious"]


def test_a_directory_that_a_later_attempt_has_is_left_alone(tmp_path):
    item = tmp_path / f"5{MARK}" / f"state{MARK}"
    item.mkdir(parents=True)
    first = attempt_at(str(item), "1", removes_all=True)
    second = attempt_at(str(item), "2", removes_all=True)
    assert first.remove([str(item)])
    assert item.exists()
    assert second.is_there


def test_a_save_of_the_same_step_does_not_lose_what_it_wrote_to_the_one_before(tmp_path, tree):
    """Two managers, one directory: the first has a failed step, which the second saves."""
    first, second = manager_of(tmp_path), manager_of(tmp_path)
    with first, second:
        with failing_at("finish"):
            failed_save(first, 1, items(tree))
        with held_at("finish") as gate:
            within(second.save, 1, args=items(tree))
            gate.await_call()
            threading.Timer(0.2, gate.opened.set).start()
            within(first.save, 2, args=items(tree))
            within(second.wait_until_finished)
        within(first.wait_until_finished)
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "1" / "state"), tree)


# Failed saves that are logged.


def test_logged_failures_are_counted_and_the_list_of_steps_stays_true(tmp_path, tree, caplog):
    with manager_of(tmp_path, max_to_keep=1) as manager:
        failed = lazy_orbax.log_failed_saves(manager)
        good_save(manager, 1, items(tree))
        for step in (2, 3):
            with failing_at("finish"):
                good_save(manager, step, items(tree))
            assert manager.all_steps() == [1]
            assert os.path.isdir(tmp_path / "1")
        assert failed.count == 2
        assert failed.last.step == 3
        assert "training goes on" in caplog.text
        with failing_at("finish"):
            within(manager.save, 4, args=items(tree))
            join_threads("async_save", "save_finalize")
        assert within(manager.save, 5, args=items(tree))  # Told of 4, and saves 5 all the same.
        within(manager.wait_until_finished)
        assert failed.count == 3
        assert sorted(os.listdir(tmp_path)) == ["5"]


def test_save_that_fails_at_once_returns_false_and_mistakes_are_raised(tmp_path, tree):
    with manager_of(tmp_path) as manager:
        failed = lazy_orbax.log_failed_saves(manager)
        with failing_at("copy"):
            assert within(manager.save, 1, args=items(tree)) is False
        assert failed.count == 1
        tree["w"].delete()
        with pytest.raises(lazy_orbax.errors.DeletedArrayError):
            within(manager.save, 2, args=items(tree))
        assert failed.count == 1


@pytest.mark.parametrize("kind", [ocp.AsyncCheckpointer, ocp.Checkpointer])
def test_other_checkpointers_log_as_well(tmp_path, tree, kind):
    with kind(lazy_orbax.standard_handler()) as checkpointer:
        failed = lazy_orbax.log_failed_saves(checkpointer)
        with failing_at("finish"):
            within(checkpointer.save, tmp_path / "1", args=ocp.args.StandardSave(tree))
            if kind is ocp.AsyncCheckpointer:
                within(checkpointer.wait_until_finished)
        assert failed.count == 1
        assert os.listdir(tmp_path) == []
        within(checkpointer.save, tmp_path / "1", args=ocp.args.StandardSave(tree))
    assert failed.count == 1
    assert os.listdir(tmp_path) == ["1"]


def test_only_what_saves_can_log_its_failures():
    with pytest.raises(lazy_orbax.errors.OptionError, match="no save"):
        lazy_orbax.log_failed_saves(object())


def steps_in(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


def test_the_manager_has_the_steps_back_that_a_failed_save_was_to_replace(tmp_path, tree):
    with manager_of(tmp_path, max_to_keep=2) as manager:
        good_save(manager, 1, items(tree))
        good_save(manager, 2, items(tree))
        with failing_at("finish"):
            failed_save(manager, 3, items(tree))
        assert steps_in(tmp_path) == [1, 2]
        good_save(manager, 4, items(tree))
        assert manager.all_steps() == steps_in(tmp_path) == [2, 4]


def test_no_step_is_removed_early_where_there_is_room(tmp_path, tree):
    with manager_of(tmp_path) as manager:
        for step in (1, 2, 3, 4):
            good_save(manager, step, items(tree))
    with manager_of(tmp_path, max_to_keep=2) as manager:
        with failing_at("finish"):
            failed_save(manager, 5, items(tree))
        with held_at("finish") as gate:
            within(manager.save, 6, args=items(tree))
            gate.await_call()
            assert steps_in(tmp_path) == [1, 2, 3, 4]
            gate.opened.set()
            within(manager.wait_until_finished)
        assert manager.all_steps() == steps_in(tmp_path) == [4, 6]


@pytest.mark.parametrize("place", ["copy", "finish"])
def test_a_failure_that_is_logged_keeps_no_state_alive(tmp_path, mesh, caplog, place):
    caplog.set_level(logging.CRITICAL, "lazy_orbax")  # pytest keeps what is logged, with frames.
    with manager_of(tmp_path) as manager:
        failed = lazy_orbax.log_failed_saves(manager)
        state = on_mesh(np.ones((8, 8), np.float32), mesh, "a")
        with failing_at(place):
            within(manager.save, 1, args=items([state]))
            within(manager.wait_until_finished)
        assert failed.last.step == 1
        old = weakref.ref(state)
        state = None
        gc.collect()
        assert old() is None


def telling(manager, *errors):
    """Makes a manager's `save()` fail at once, once with each of some errors. Returns its calls."""
    save, left, calls = manager.save, list(errors), []

    def told(step, **keywords):
        calls.append(step)
        if left:
            raise left.pop(0)
        return save(step, **keywords)

    manager.save = told
    return calls


def test_what_orbax_tells_again_of_an_earlier_failure_loses_no_save(tmp_path, tree, caplog):
    for step, error in enumerate([OSError("of a file of Orbax's"), SaveError("late", step=0)], 1):
        with manager_of(tmp_path) as manager:
            calls = telling(manager, error)
            failed = lazy_orbax.log_failed_saves(manager)
            assert within(manager.save, step, args=items(tree)) is True
            within(manager.wait_until_finished)
            assert (calls, failed.count) == ([step, step], 0)
            assert manager.latest_step() == step
        assert str(error) in caplog.text


def test_a_save_that_fails_by_itself_is_not_begun_again_and_again(tmp_path, tree):
    refused = OSError("refused"), OSError("refused again")
    for error, n_calls in ([SaveError("its own", step=1)], 1), (refused, 2):
        with manager_of(tmp_path) as manager:
            calls = telling(manager, *error)
            failed = lazy_orbax.log_failed_saves(manager)
            assert within(manager.save, 1, args=items(tree)) is False
            assert (calls, failed.count) == ([1] * n_calls, 1)
            assert manager.all_steps() == []


def test_to_look_for_the_manager_keeps_no_state_alive(tmp_path, mesh):
    with ocp.AsyncCheckpointer(lazy_orbax.standard_handler()) as checkpointer:  # It has none.
        state = on_mesh(np.ones((8, 8), np.float32), mesh, "a")
        with failing_at("finish"), pytest.raises(SaveError):
            within(checkpointer.save, tmp_path / "1", args=ocp.args.StandardSave([state]))
            within(checkpointer.wait_until_finished)
        checkpointer.save(tmp_path / "2", args=ocp.args.StandardSave([state]))
        checkpointer.wait_until_finished()
        old = weakref.ref(state)
        state = None
        gc.collect()
        assert old() is None
