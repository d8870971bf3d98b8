"""The first save of a tree on CPU: it copies, and what packs it is compiled for the next ones."""

from __future__ import annotations

import contextlib
import logging
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import HANG_S
from equipment.training import SLAB_BYTES, Steps, cached_on_host, make_state, pointers
from equipment.trees import assert_same

import lazy_orbax
from lazy_orbax.save.plan_cache import PLAN_CACHE
from lazy_orbax.snapshot import compiling
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.snapshot.programs import PROGRAMS

pytestmark = pytest.mark.usefixtures("copying_first", "no_programs")


@pytest.fixture
def no_programs():
    """Nothing is compiled yet, though other tests saved the same state."""
    PLAN_CACHE.clear()
    PROGRAMS.clear()


@contextlib.contextmanager
def managed(path, **options):
    """A manager, and the timelines of its saves."""
    lines = []
    options = {"slab_bytes": SLAB_BYTES, **options}
    handler = lazy_orbax.standard_handler(
        options=lazy_orbax.LazyOptions(on_timeline=lines.append, **options)
    )
    with ocp.CheckpointManager(path, item_handlers=handler) as manager:
        yield manager, lines


def compiled():
    """Waits for the threads that compile. Returns how many there were."""
    threads = [t for t in threading.enumerate() if t.name == "lazy_orbax-compile"]
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    return len(threads)


def save(manager, step, state):
    manager.save(step, args=ocp.args.StandardSave(state))


def modes(lines):
    return [set(line.mode.split("+")) for line in lines]


def test_the_first_save_copies_and_the_next_one_stages(tmp_path, mesh):
    state = make_state(mesh)
    with managed(tmp_path) as (manager, lines):
        for step in range(2):
            save(manager, step, state)
            manager.wait_until_finished()
            compiled()
        # A new tree later in the process is a first one again.
        save(manager, 2, {**state, "more": state["half"]})
        manager.wait_until_finished()
        first, second, third = (found & {"copy", "stage"} for found in modes(lines))
        assert (first, second) == ({"copy"}, {"stage"})
        assert "copy" in third
        assert "compiled" in lines[0].reason


@pytest.mark.parametrize("verify_snapshot", [0, 1])
def test_its_arrays_may_be_donated_at_once(tmp_path, mesh, verify_snapshot):
    state = make_state(mesh)
    steps = Steps(state)
    state = steps.donating(state)  # It was in memory of NumPy, which nobody can donate.
    wanted, before = steps.bytes_of(state), pointers(state)
    with managed(tmp_path, verify_snapshot=verify_snapshot) as (manager, lines):
        save(manager, 0, state)
        assert not cached_on_host(state)
        state = steps.donating(state)
        assert pointers(state) == before
        manager.wait_until_finished()
        assert "copy" in lines[0].mode
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "0" / "default"), wanted)


def test_programs_that_cannot_be_compiled_are_told_of_and_saves_stay_right(
    tmp_path, mesh, monkeypatch, caplog
):
    def fail(plan, slab):
        raise RuntimeError("no memory for the compiler")

    monkeypatch.setattr(compiling, "compile_ahead", fail)
    state = make_state(mesh)
    steps, wanted = Steps(state), []
    with caplog.at_level(logging.ERROR, "lazy_orbax"), managed(tmp_path) as (manager, lines):
        for step in range(2):
            wanted.append(steps.bytes_of(state))
            save(manager, step, state)
            state = steps.donating(state)
            manager.wait_until_finished()
            compiled()
        assert all("copy" in found for found in modes(lines))
    assert [r.getMessage()[:24] for r in caplog.records] == ["The programs that pack a"]
    with ocp.StandardCheckpointer() as stock:
        for step in range(2):
            assert_same(stock.restore(tmp_path / str(step) / "default"), wanted[step])


def test_what_it_copies_counts_as_host_memory(tmp_path, mesh, monkeypatch):
    budget_bytes = 4 * SLAB_BYTES
    monkeypatch.setattr(HOST_BUDGET, "_peak_bytes", 0)
    rng = np.random.default_rng(0)
    state = {
        str(i): jax.device_put(
            rng.standard_normal(SLAB_BYTES // 8).astype(np.float32),
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("a", "b"))),
        )
        for i in range(24)
    }
    with managed(tmp_path, host_bytes=budget_bytes) as (manager, lines):
        save(manager, 0, state)
        manager.wait_until_finished()
        assert modes(lines) == [{"copy"}]
        assert 0 < HOST_BUDGET.peak_bytes <= budget_bytes
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "0" / "default"), state)


def test_a_save_that_is_asked_to_stage_compiles_itself(tmp_path, mesh):
    with managed(tmp_path, mode="stage") as (manager, lines):
        save(manager, 0, make_state(mesh))
        manager.wait_until_finished()
        assert "copy" not in modes(lines)[0]
        assert compiled() == 0


def test_close_does_not_wait_for_every_program(tmp_path, mesh, monkeypatch):
    done, began, goes_on = [], threading.Event(), threading.Event()

    def compile_ahead(plan, slab):
        began.set()
        assert goes_on.wait(HANG_S)
        done.append(slab)

    monkeypatch.setattr(compiling, "compile_ahead", compile_ahead)
    stopped = threading.Event.set
    with managed(tmp_path) as (manager, _):
        save(manager, 0, make_state(mesh))
        manager.wait_until_finished()
        assert began.wait(HANG_S)
        (one,) = [one for one in compiling._RUNNING if one._thread is not None]
        monkeypatch.setattr(one._stopped, "set", lambda: (stopped(one._stopped), goes_on.set()))
    assert len(done) == 1
