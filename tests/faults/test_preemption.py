"""The job is told to end in the middle of a slow save."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import failing_at, held_at, within
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import assert_same
from jax.experimental import multihost_utils

import lazy_orbax
from lazy_orbax import _machine
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.recovery import preemption
from lazy_orbax.storage import pace as pacing

_TESTS = pathlib.Path(__file__).parent.parent
# The least that an option may be: six seconds for the state. The tests make it slower still.
SLOW = {"slab_bytes": SLAB_BYTES, "write_bytes_per_s": SLAB_BYTES}


@pytest.fixture
def noted():
    """The numbers of the signals that reached the handler that was there before ours."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def manager(tmp_path, monkeypatch):
    # Slower than an option may make it.
    monkeypatch.setattr(pacing.Pace, "__init__", slowly(pacing.Pace.__init__))
    handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(**SLOW))
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        yield manager


def slowly(initialize):
    return lambda self, bytes_per_s: initialize(self, bytes_per_s and bytes_per_s // 64)


def get_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("asked", [1, 2])
def test_what_is_in_flight_is_finished_and_the_last_step_saved(
    tmp_path, mesh, manager, noted, asked
):
    state = make_state(mesh)
    steps, saves = Steps(state), []
    wanted = {1: steps.bytes_of(state)}
    save = manager.save
    manager.save = lambda step, **keywords: saves.append(step) or save(step, **keywords)
    with lazy_orbax.Preemption(grace_s=60) as notice:
        manager.save(1, args=ocp.args.StandardSave(state))
        if asked == 2:
            state = steps.donating(state)
            wanted[2] = steps.bytes_of(state)
        assert not notice.reached(manager, asked)
        get_sigterm()
        assert notice.noticed
        assert notice.reached(manager, asked)
        outcome = within(
            notice.last_save, manager, asked, args=ocp.args.StandardSave(state), timeout_s=50
        )
    assert outcome.committed
    assert outcome.error is None
    assert (outcome.step, outcome.in_flight, outcome.newest_step) == (asked, 1, asked)
    assert outcome.taken_s < 30  # The throttle alone would have taken minutes.
    assert saves == list(range(1, asked + 1))
    assert noted == [signal.SIGTERM]
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == list(wanted)
        for step, tree in wanted.items():
            assert_same(stock.restore(step), tree)


def test_the_deadline_is_kept(mesh, manager, noted):
    tree = {"w": np.ones(8)}
    with lazy_orbax.Preemption(grace_s=0.3) as notice, held_at("wait") as gate:
        manager.save(1, args=ocp.args.StandardSave(tree))
        gate.await_call()
        get_sigterm()
        outcome = within(notice.last_save, manager, 2, args=ocp.args.StandardSave(tree))
        assert not outcome.committed
        assert isinstance(outcome.error, TimeoutError)
        assert (outcome.in_flight, outcome.newest_step) == (1, None)
        assert 0.1 < outcome.taken_s < 5
        gate.opened.set()
        for thread in threading.enumerate():
            if thread.name == "lazy_orbax-last-save":
                thread.join(30)
    assert manager.all_steps() == [1, 2]


def test_a_last_save_that_fails_says_so(manager, noted):
    tree = {"w": np.ones(8)}
    with lazy_orbax.Preemption() as notice:
        within(manager.save, 1, args=ocp.args.StandardSave(tree))
        within(notice.last_save, manager, 1, args=ocp.args.StandardSave(tree))
        with failing_at("finish"):
            outcome = within(notice.last_save, manager, 2, args=ocp.args.StandardSave(tree))
    assert not outcome.committed
    assert isinstance(outcome.error, SaveError)
    assert outcome.error.step == 2
    assert outcome.newest_step == 1


def test_a_step_in_flight_that_fails_is_saved_again(manager, noted):
    tree = {"w": np.ones(8)}
    with lazy_orbax.Preemption() as notice:
        with held_at("finish") as gate, failing_at("sync"):
            within(manager.save, 1, args=ocp.args.StandardSave(tree))
            gate.await_call()
            gate.opened.set()
            for thread in threading.enumerate():
                if thread.name == "async_save":
                    thread.join(30)
        outcome = within(notice.last_save, manager, 1, args=ocp.args.StandardSave(tree))
    assert outcome.committed
    assert manager.all_steps() == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_the_priority_of_threads_is_given_back(monkeypatch):
    found, told = [], threading.Event()
    hurried = threading.Event()

    def work():
        _machine.yield_to_training()
        told.set()
        assert hurried.wait(30)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
    thread = threading.Thread(target=work)
    thread.start()
    assert told.wait(30)
    _machine.raise_priority()
    hurried.set()
    thread.join(30)
    may_raise = os.geteuid() == 0
    assert found == [usual if may_raise else _machine._NICE]


def test_the_handler_that_was_there_comes_back_and_saves_are_slow_again(noted):
    before = signal.getsignal(signal.SIGTERM)
    with lazy_orbax.Preemption() as notice:
        assert signal.getsignal(signal.SIGTERM) is not before
        notice.notice()
        assert _machine._Urgency.hurry
    assert signal.getsignal(signal.SIGTERM) is before
    assert not _machine._Urgency.hurry


def test_no_handler_is_installed_where_it_must_not_be(noted, monkeypatch):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with lazy_orbax.Preemption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(30)
    # JAX notices itself then, in C++, and lets the processes agree. Ours would replace it.
    monkeypatch.setattr(preemption, "_jax_notices", lambda: True)
    enter()
    assert seen == [before, before]


def test_of_several_processes_the_step_is_the_one_that_jax_agreed_on(manager, monkeypatch, noted):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(manager, "reached_preemption", lambda step: step == 3)
    with lazy_orbax.Preemption() as notice:
        get_sigterm()
        assert [notice.reached(manager, step) for step in (1, 2, 3)] == [False, False, True]


def test_a_save_that_ends_late_does_not_tell_jax_of_its_step(manager, monkeypatch, noted):
    """JAX would take the process for so far back, and agree on a step that it is past."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils,
        "reached_preemption_sync_point",
        lambda step: asked.append(step) or step > 6,
    )
    tree = {"w": np.ones(8)}
    with lazy_orbax.Preemption() as notice:
        assert not notice.reached(manager, 2)
        monkeypatch.setattr(jax, "process_count", lambda: 1)
        with held_at("finish") as gate:
            within(manager.save, 3, args=ocp.args.StandardSave(tree))
            gate.await_call()
            assert not manager.reached_preemption(6)
            gate.opened.set()
            within(manager.wait_until_finished)
        assert asked == sorted(asked)
        assert asked[-1] == 6
        assert not _machine._Urgency.hurry
        assert manager.reached_preemption(7)
        assert _machine._Urgency.hurry  # Also where Orbax asked: it waits then for the save before.
        assert not manager.reached_preemption(6)
        assert manager.reached_preemption(7)
    assert type(manager.reached_preemption) is type(manager.save)


@pytest.mark.parametrize("grace_s", [0, -1, "30", True, None])
def test_the_grace_is_a_number_of_seconds(grace_s):
    with pytest.raises(OptionError, match="grace_s"):
        lazy_orbax.Preemption(grace_s=grace_s)


def test_a_process_that_gets_the_signal_saves_and_ends(tmp_path, mesh):
    path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(_TESTS / "faults" / "preempted.py"), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        watchdog = threading.Timer(90, child.kill)
        watchdog.start()
        assert child.stdout.readline() == "SAVING\n"
        child.send_signal(signal.SIGTERM)
        outcome = json.loads(child.stdout.readline())
        assert child.wait() == 0
        watchdog.cancel()
    assert outcome["committed"]
    assert outcome["in_flight"] in (0, None)  # It may be faster, now that nothing slows it.
    state = make_state(mesh)
    steps = Steps(state)
    for _ in range(outcome["step"]):
        state = steps.donating(state)
    with ocp.CheckpointManager(
        tmp_path / "run", item_handlers=ocp.StandardCheckpointHandler()
    ) as stock:
        assert stock.all_steps() == [0, outcome["step"]]
        assert_same(stock.restore(outcome["step"]), steps.bytes_of(state))
