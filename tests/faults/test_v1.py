"""Saves of Orbax v1 that fail, are cancelled or killed, and what is found to be wrong later."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as v0
import pytest
from equipment.gates import failing_at, held_at, join_threads, within
from equipment.oracle import STOCK_WARNS
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import abstract, assert_same
from faults import disks
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax.errors import CorruptCheckpointError, DeletedArrayError, SaveError
from lazy_orbax.handlers.v1 import lazy_v1
from lazy_orbax.save import publication
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

_TESTS = pathlib.Path(__file__).parent.parent
pytestmark = STOCK_WARNS


@pytest.fixture(autouse=True)
def timelines():
    """Makes v1 lazy for a test. Returns the timelines of what it saves."""
    found = []
    undo = lazy_v1(lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES, on_timeline=found.append))
    yield found
    undo()


class Failing:
    """A stateful item that cannot be saved."""

    def __init__(self, *, at_once):
        self._at_once = at_once

    async def save(self, directory):
        async def fail():
            raise RuntimeError("the iterator has no state")

        if self._at_once:
            raise RuntimeError("the iterator has no state")
        return fail()

    async def load(self, directory):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("copy", "5"),
        ("to the host", "best"),
        ("open", "5"),
        ("hand over", "best"),
        ("finish", "5"),
        ("sync", "best"),
    ],
)
def test_a_failed_save_leaves_nothing_and_the_next_one_works(
    tmp_path, mesh, timelines, place, name
):
    state = make_state(mesh)
    with failing_at(place), pytest.raises(SaveError, match=f"no luck at {place}"):
        v1.save(tmp_path / name, state)
    assert os.listdir(tmp_path) == []
    assert HOST_BUDGET.in_flight_bytes == 0
    v1.save(tmp_path / name, state)
    assert_same(v1.load(tmp_path / name, abstract(state)), state)
    assert [line.error is None for line in timelines] == [False, True]
    assert [line.committed_s is None for line in timelines] == [True, False]
    assert {line.directory for line in timelines} == {str(tmp_path / name / "state")}


@pytest.mark.parametrize("at_once", [True, False])
def test_where_another_item_fails_nothing_is_left(tmp_path, mesh, timelines, at_once):
    state = make_state(mesh)
    both = {"state": state, "iterator": Failing(at_once=at_once)}
    with pytest.raises(RuntimeError, match="has no state"):
        v1.save_checkpointables(tmp_path / "5", both)
    v1.save(tmp_path / "6", state)
    assert os.listdir(tmp_path) == ["6"]
    assert HOST_BUDGET.in_flight_bytes == 0
    assert [line.error is None for line in timelines] == [False, True]


def test_what_is_refused_is_refused_at_once(tmp_path, mesh):
    state = make_state(mesh)
    jax.tree.leaves(state)[0].delete()
    with pytest.raises(DeletedArrayError, match="columns"):
        within(v1.save, tmp_path / "5", state)
    v1.save(tmp_path / "5", make_state(mesh))
    assert os.listdir(tmp_path) == ["5"]


def test_a_failure_is_told_by_the_checkpointer_and_the_next_save_works(tmp_path, mesh, timelines):
    state = make_state(mesh)
    with v1.training.Checkpointer(tmp_path) as run:
        run.save(1, state)
        with failing_at("finish"):
            response = run.save_async(2, state)
            assert response is not None
            with pytest.raises(SaveError, match="no luck at finish"):
                within(response.result)
        with pytest.raises(SaveError, match="no luck at finish"):
            run.wait()  # Orbax tells it once more.
        run.save(3, state, force=True)
        assert [found.step for found in run.checkpoints] == [1, 3]
    assert disks.temporary(tmp_path) == []
    assert [line.error is None for line in timelines] == [True, False, True]


def test_a_save_is_cancelled_and_the_next_one_works(tmp_path, mesh, timelines):
    state = make_state(mesh)
    with v1.training.Checkpointer(tmp_path) as run:
        run.save(1, state)
        with held_at("hand over") as gate:
            assert run.save_async(2, state, force=True) is not None
            gate.await_call()
            run.cancel()
            gate.opened.set()
            within(run.wait)
        join_threads("lazy_orbax-write")  # What it writes is removed when it writes no more.
        run.reload()
        assert [found.step for found in run.checkpoints] == [1]
        run.save(3, state, force=True)
        assert [found.step for found in run.checkpoints] == [1, 3]
        assert_same(run.load(3, abstract(state)), state)
    assert disks.temporary(tmp_path) == []
    assert HOST_BUDGET.in_flight_bytes == 0
    assert [line.committed_s is None for line in timelines] == [False, True, False]


@pytest.mark.parametrize("way", ["save", "Checkpointer"])
def test_a_full_disk(tmp_path, mesh, way):
    state = make_state(mesh)
    with disks.mounted("tmpfs", tmp_path / "disk", 64 * disks.MIB) as disk:
        run = v1.training.Checkpointer(disk / "run") if way == "Checkpointer" else None
        save = run.save if run else lambda n, tree, force: v1.save(disk / "run" / f"{n}", tree)
        save(0, state, force=True)
        needed = disks.bytes_in(disk / "run" / "0")
        for n in (0, 1, 4, 7, 9):
            with disks.filled(disk, needed * n // 10):
                with pytest.raises(Exception, match=os.strerror(errno.ENOSPC)):
                    save(10 + n, state, force=True)
                assert disks.temporary(disk) == []
            if run is not None:  # Orbax tells of some failures once more.
                with contextlib.suppress(Exception):
                    run.wait()
            assert HOST_BUDGET.in_flight_bytes == 0
        save(20, state, force=True)
        names = {name for name in os.listdir(disk / "run") if name.isdecimal()}
        assert names == {"0", "20"}
        assert_same(v1.load(disk / "run" / "20", abstract(state)), state)
        if run is not None:
            run.close()


def in_a_process(root, place, call, way):
    path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
    script = str(_TESTS / "faults" / "killed_v1.py")
    return subprocess.run(
        [sys.executable, script, str(root), place, str(call), way],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize(
    ("place", "call", "way"),
    [
        pytest.param("hand over", 2, "save_async", marks=pytest.mark.slow),
        pytest.param("copy", 2, "Checkpointer", marks=pytest.mark.slow),
        pytest.param("to the host", 2, "save_async", marks=pytest.mark.slow),
        pytest.param("finish", 1, "save_async", marks=pytest.mark.slow),
        pytest.param("finish", 1, "Checkpointer", marks=pytest.mark.slow),
        pytest.param("sync", 1, "save_async", marks=pytest.mark.slow),
        ("sync", 3, "Checkpointer"),
        pytest.param("sync", 3, "save_async", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_leaves_the_step_before(tmp_path, mesh, place, call, way):
    root = tmp_path / "run"
    killed = in_a_process(root, place, call, way)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    state = make_state(mesh)
    with v0.CheckpointManager(root) as stock:
        assert stock.all_steps() == [1]
    assert_same(v1.load(root / "1", abstract(state)), state)
    if way == "Checkpointer":
        with v1.training.Checkpointer(root) as run:
            assert run.latest.step == 1
            run.save(2, state, force=True)
    else:
        v1.save(root / "2", state)
    assert_same(v1.load(root / "2", abstract(state)), state)


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 12),
    reason="Python 3.12 starts no thread once the main thread has ended, and Orbax needs some",
)
@pytest.mark.parametrize(
    "way", ["save_async", pytest.param("Checkpointer", marks=pytest.mark.slow)]
)
def test_a_process_that_ends_without_waiting_finishes_its_save(tmp_path, mesh, way):
    root = tmp_path / "run"
    ended = in_a_process(root, "", 1, way)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "it is finished first" in ended.stderr
    state = make_state(mesh)
    wanted = Steps(state).donating(state)
    assert sorted(os.listdir(root)) == ["1", "2"]
    assert_same(v1.load(root / "2", abstract(wanted)), wanted)


@pytest.mark.parametrize("target", [True, False])
def test_a_flipped_bit_is_found(tmp_path, mesh, target):
    state = make_state(mesh)
    context = v1.Context()
    context.array.saving.use_compression = False
    with context:
        v1.save(tmp_path / "5", state)
    files = (tmp_path / "5" / "state" / "d").iterdir()
    data = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        v1.load(tmp_path / "5", abstract(state) if target else None)
    assert not lazy_orbax.verify(tmp_path / "5").is_whole


def test_a_publication_that_nobody_heard_of_is_made_up_for(tmp_path, mesh, timelines, monkeypatch):
    monkeypatch.setattr(publication, "PUBLISHED_EVENTS", frozenset())
    v1.save(tmp_path / "5", make_state(mesh))
    assert timelines[0].committed_s is not None


def test_a_numpy_array_is_the_callers_again(tmp_path):
    array = np.arange(1000)
    response = v1.save_async(tmp_path / "5", {"a": array})
    array[:] = 0
    response.result()
    np.testing.assert_array_equal(v1.load(tmp_path / "5")["a"], np.arange(1000))


@pytest.mark.parametrize("asked", [1, 2])
def test_the_last_save_before_the_end(tmp_path, mesh, timelines, asked):
    state = make_state(mesh)
    with (
        lazy_orbax.Preemption(grace_s=60) as notice,
        v1.training.Checkpointer(tmp_path) as run,
    ):
        assert not notice.reached(run, 0)
        with held_at("hand over") as gate:
            assert run.save_async(1, state) is not None
            gate.await_call()
            notice.notice()
            assert notice.reached(run, asked)
            gate.opened.set()
            outcome = within(notice.last_save, run, asked, args={"state": state}, timeout_s=50)
        assert outcome.committed
        assert (outcome.in_flight, outcome.newest_step, outcome.error) == (1, asked, None)
        assert_same(run.load(asked, abstract(state)), state)
    assert [line.step for line in timelines] == list(range(1, asked + 1))
