"""The pace of writing, on a clock of the test's own."""

import os
import random
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax import _machine
from lazy_orbax.save import write_loop
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage import pace as pacing


class Clock(threading.Event):
    """A clock that waiting moves on."""

    def __init__(self):
        super().__init__()
        self.now_s = 100.0

    def wait(self, timeout=None):
        self.now_s += max(0.0, timeout)
        return False

    def waited_s(self, pace, n_bytes, ended=None):
        """Returns how long a turn was waited for."""
        before_s = self.now_s
        pace.await_turn(n_bytes, ended or self)
        return round(self.now_s - before_s, 6)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pacing.time, "monotonic", lambda: clock.now_s)
    return clock


def test_what_is_let_through_is_as_fast_as_asked_on_average(clock):
    pace = pacing.Pace(10)
    assert [clock.waited_s(pace, 20) for _ in range(5)] == [0, 2, 2, 2, 2]


def test_time_in_which_nothing_was_written_is_not_saved_up(clock):
    pace = pacing.Pace(10)
    pace.await_turn(20, clock)
    clock.now_s += 1000
    assert [clock.waited_s(pace, 20) for _ in range(3)] == [0, 2, 2]


@pytest.mark.parametrize("limit", [2**20, 50 * 10**6, 200 * 10**6, 2**29])
@pytest.mark.parametrize("seed", range(3))
def test_delays_do_not_add_up_and_the_limit_is_never_passed(clock, limit, seed):
    """Of a node: whoever asks for the next bytes is late at times, and the wait itself is long."""
    delays = random.Random(seed)
    pace = pacing.Pace(limit, late_s=1.0, is_paid_before=True)
    for _ in range(2):  # The idle time before the second counts for nothing.
        clock.now_s += 3600
        pace.begin()
        began_s, sent = clock.now_s, 0
        while sent < 10 * limit:  # Ten seconds.
            clock.now_s += delays.choice([0.001] * 12 + [0.01, 0.15, 0.3])
            pace.await_turn(limit // 10, clock)
            sent += limit // 10
            assert sent <= limit * (clock.now_s - began_s) * (1 + 1e-9)
        assert sent >= 0.95 * limit * (clock.now_s - began_s)


def test_without_that_delays_do_add_up(clock):
    pace = pacing.Pace(10)
    waited_s = []
    for _ in range(4):
        waited_s.append(clock.waited_s(pace, 20))
        clock.now_s += 2.5
    assert waited_s == [0, 0, 0, 0]


def test_items_of_one_handler_share_the_pace(clock):
    pace = pacing.Pace(10)
    assert [clock.waited_s(pace, 20, ended) for ended in (clock, clock, clock)] == [0, 2, 2]


def test_without_a_limit_nobody_waits(clock):
    pace = pacing.Pace(None)
    assert [clock.waited_s(pace, 10**12) for _ in range(3)] == [0, 0, 0]


def test_in_a_hurry_nobody_waits_and_who_waits_goes_on(clock):
    pace = pacing.Pace(10)
    pace.await_turn(10**3, clock)

    class Noticed(Clock):
        def wait(self, timeout=None):
            clock.wait(timeout)
            _machine.hurry()
            return False

    try:
        assert clock.waited_s(pace, 20, Noticed()) == pacing._LOOK_S
        assert clock.waited_s(pace, 20) == 0
    finally:
        _machine.hurry(on=False)
    assert clock.waited_s(pace, 20) > 90


def test_a_save_that_is_over_does_not_wait_for_its_turn():
    pace, ended = pacing.Pace(1), threading.Event()
    pace.await_turn(10**9, ended)
    ended.set()
    pace.await_turn(10**9, ended)  # Would be in thirty years.


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize(("low", "lowered"), [(True, _machine._NICE), (False, 0)])
def test_only_the_threads_of_a_save_are_lowered(tmp_path, monkeypatch, low, lowered):
    found = {}
    views = device_to_host.views

    def note(*args):
        found["writing"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return views(*args)

    monkeypatch.setattr(device_to_host, "views", note)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    options = lazy_orbax.LazyOptions(low_priority=low)
    with ocp.AsyncCheckpointer(lazy_orbax.standard_handler(options=options)) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.StandardSave({"x": np.ones(3)}))
    assert found == {"writing": min(mine + lowered, 19)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize(
    ("usual", "mine", "wanted"),
    [(0, 0, 10), (5, 5, 15), (15, 15, 19), (19, 19, None), (0, 10, None)],
)
def test_who_yields_is_below_the_process_and_never_raised(monkeypatch, usual, mine, wanted):
    """The kernel lets nobody raise a priority, and says so with an error."""
    process, found = os.getpid(), []
    monkeypatch.setattr(os, "getpriority", lambda _, who: usual if who == process else mine)
    monkeypatch.setattr(os, "setpriority", lambda *args: found.append(args[2]))
    monkeypatch.setattr(threading, "get_native_id", lambda: process + 1)
    monkeypatch.setattr(_machine._Urgency, "lowered", False)
    _machine.yield_to_training()
    assert found == ([] if wanted is None else [wanted])


@pytest.mark.parametrize("is_read", [True, False])
def test_memory_that_somebody_still_reads_is_not_used_again(tmp_path, mesh, monkeypatch, is_read):
    kept = []
    views = device_to_host.views

    def keep(*args):
        found = views(*args)
        if is_read:
            kept.extend(view for _, view in found)
        return found

    monkeypatch.setattr(device_to_host, "views", keep)
    # Whoever reads in this test never lets go; who is about to is waited for.
    monkeypatch.setattr(write_loop, "_LETTING_GO_S", 0 if is_read else write_loop._LETTING_GO_S)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    state = {"x": jax.device_put(np.ones((8, 6), np.float32), sharding)}
    with ocp.AsyncCheckpointer(lazy_orbax.standard_handler()) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.StandardSave(state))
        checkpointer.wait_until_finished()
        assert (HOST_BUDGET.idle_bytes == 0) == is_read
