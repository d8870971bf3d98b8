"""What packs a plan is compiled in the background, unless that fails or is stopped."""

import logging
import threading

import jax
import numpy as np
import pytest
from equipment.gates import HANG_S
from equipment.kept import plan_of
from equipment.trees import on_mesh
from jax.sharding import Mesh

from lazy_orbax.snapshot import compiling
from lazy_orbax.snapshot.compiling import Compiling, compiling_of, stop_compiling
from lazy_orbax.snapshot.pack import is_compiled

MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
LARGE = (2**19,)  # Two such leaves are more than a slab.


def plan_of_slabs(n):
    plan = plan_of([on_mesh(np.ones(LARGE, np.float32), MESH, "a") for _ in range(n)])
    assert len(plan.slabs) == n
    return plan


@pytest.fixture
def compiled(monkeypatch):
    """Slabs whose programs are said to be compiled."""
    slabs, called = [], threading.Event()

    def compile_ahead(plan, slab):
        slabs.append(slab)
        called.set()

    monkeypatch.setattr(compiling, "compile_ahead", compile_ahead)
    monkeypatch.setattr(compiling, "is_compiled", lambda plan, slab: slab in slabs)
    return slabs


def begin(one, plan):
    """Returns the threads that were begun: one, or none."""
    before = one._thread
    one.begin(plan, lower_priority=lambda: None)
    return [] if one._thread is before else [one._thread]


def ended(threads):
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    return len(threads)


def test_the_slabs_that_are_packed_are_compiled_once():
    plan = plan_of([on_mesh(np.ones((8, 6), np.float32), MESH, "a"), np.ones(3)])
    packed = next(slab for slab in plan.slabs if slab.kind == "mesh")
    assert not is_compiled(plan, packed)
    ended(begin(compiling_of(plan), plan))
    assert is_compiled(plan, packed)
    assert begin(compiling_of(plan), plan) == []
    assert compiling_of(plan) is compiling_of(plan)


def test_where_nothing_is_packed_in_host_memory_there_is_no_thread(monkeypatch, compiled):
    assert begin(Compiling(), plan_of([np.ones(3)])) == []
    monkeypatch.setattr(compiling, "is_in_host_memory", lambda slab: False)
    assert begin(Compiling(), plan_of_slabs(2)) == []
    assert compiled == []


def test_it_has_the_priority_that_it_is_given_and_is_waited_for(compiled):
    lowered, plan = [], plan_of_slabs(2)
    one = Compiling()
    one.begin(plan, lower_priority=lambda: lowered.append(threading.current_thread()))
    ended([one._thread])
    (thread,) = lowered
    assert (thread.name, thread.daemon) == ("lazy_orbax-compile", False)
    assert compiled == list(plan.slabs)


def test_a_failure_is_told_once_and_not_tried_again(monkeypatch, caplog):
    def fail(plan, slab):
        raise RuntimeError("no memory for the compiler")

    monkeypatch.setattr(compiling, "compile_ahead", fail)
    plan = plan_of_slabs(2)
    with caplog.at_level(logging.WARNING, "lazy_orbax"):
        assert ended(begin(compiling_of(plan), plan)) == 1
        assert begin(compiling_of(plan), plan) == []
    (record,) = caplog.records
    assert "could not be compiled" in record.getMessage()
    assert "no memory for the compiler" in caplog.text
    assert compiling_of(plan).has_failed


def test_it_is_stopped_after_a_program_and_goes_on_later(monkeypatch):
    done, began, goes_on = [], threading.Event(), threading.Event()

    def compile_ahead(plan, slab):
        began.set()
        assert goes_on.wait(HANG_S)
        done.append(slab)

    monkeypatch.setattr(compiling, "compile_ahead", compile_ahead)
    monkeypatch.setattr(compiling, "is_compiled", lambda plan, slab: slab in done)
    plan, one = plan_of_slabs(3), Compiling()
    threads = begin(one, plan)
    assert began.wait(HANG_S)
    assert begin(one, plan) == []  # One at a time.
    is_set = one._stopped.set
    monkeypatch.setattr(one._stopped, "set", lambda: (is_set(), goes_on.set()))
    stop_compiling()
    assert ended(threads) == 1
    assert done == [plan.slabs[0]]
    ended(begin(one, plan))
    assert done == list(plan.slabs)


def test_no_thread_to_be_had_is_no_failure(monkeypatch, compiled):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    plan, one = plan_of_slabs(1), Compiling()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert begin(one, plan) == []
    assert ended(begin(one, plan)) == 1
    assert compiled == list(plan.slabs)
