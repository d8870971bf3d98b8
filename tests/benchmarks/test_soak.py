"""What a soak counts: the checks of it must be able to fail."""

from __future__ import annotations

import collections
import dataclasses
import random
import shutil

import jax
import orbax.checkpoint as ocp
import pytest

from benchmarks.soak import supervisor, training
from benchmarks.soak.counted import counted as counted_in
from benchmarks.soak.ledger import Ledger

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


@pytest.fixture
def saved(tmp_path):
    """Two steps that are committed, and the ledger that says so."""
    options = supervisor.drawn(random.Random(0), tmp_path / "run", tmp_path / "ledger", "mixed")
    ledger, state = Ledger(tmp_path / "ledger"), training.state_of("mixed")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            ledger.note("saving", step=step, digest=training.digest_of(state), bytes=1)
            manager.save(step, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            ledger.note("committed", step=step)
    return options, ledger, state


def counted(options, ledger, state):
    before = len(ledger.read())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    training.check(options, ledger, target)
    return collections.Counter(event["event"] for event in ledger.read()[before:])


def test_what_is_there_is_right(saved):
    assert counted(*saved) == {"restored": 2}


def test_a_step_that_is_gone_is_lost(saved):
    options, ledger, state = saved
    (ledger._path.parent / "run" / "1").rename(ledger._path.parent / "elsewhere")
    assert counted(options, ledger, state) == {"restored": 1, "lost": 1}


def test_a_step_that_cannot_be_read_is_lost(saved):
    options, ledger, state = saved
    (ledger._path.parent / "run" / "2" / "default" / "_METADATA").write_text("")
    assert counted(options, ledger, state) == {"restored": 1, "lost": 1}
    flipped = dataclasses.replace(options, flipped=2)
    assert counted(flipped, ledger, state) == {"restored": 1, "flip detected": 1}


def test_other_bits_are_wrong(saved):
    options, ledger, state = saved
    path = ledger._path
    path.write_text(path.read_text().replace(training.digest_of(state), "0" * 32, 1))
    assert counted(options, ledger, state) == {"restored": 1, "wrong": 1}


def test_what_an_attempt_before_held_is_wrong(saved):
    options, ledger, state = saved
    ledger.note("saving", step=2, digest="of another attempt", bytes=1)
    assert counted(options, ledger, state) == {"restored": 1, "wrong": 1}


def test_only_a_step_that_was_to_be_removed_may_be_half_removed(saved):
    options, ledger, state = saved
    run = ledger._path.parent / "run"
    for step in (3, 4, 5):
        shutil.copytree(run / "2", run / str(step))
        ledger.note("saving", step=step, digest=training.digest_of(state), bytes=1)
    shutil.rmtree(run / "1" / "default" / "d")
    assert counted(options, ledger, state) == {"restored": 4, "half retired": 1}
    shutil.rmtree(run / "2" / "default" / "d")
    assert counted(options, ledger, state) == {"restored": 3, "half retired": 1, "lost": 1}


def test_half_a_line_of_a_killed_process_takes_no_other_along(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.note("saving", step=1)
    with (tmp_path / "ledger").open("a") as file:
        file.write('{"event": "sav')
    ledger.note("lost", step=2)
    events = ledger.read()
    assert [event["event"] for event in events] == ["saving", "torn line", "lost"]


_SAVING = {"event": "saving", "step": 1, "bytes": 7}
_COMMITTED = {"event": "committed", "step": 1}
_FAILED_AGAIN = {"event": "failed", "step": 1, "again": True}
_KILLED = {"event": "ended", "ending": "killed"}
_BY_ITSELF = {"event": "ended", "ending": "left alone"}


def counts_of(tmp_path, *events):
    ledger = Ledger(tmp_path / "ledger")
    for event in events:
        ledger.note(**event)
    return counted_in([ledger])


@pytest.mark.parametrize(
    ("events", "count"),
    [
        ([_SAVING, _COMMITTED, _BY_ITSELF], {"saving": 1, "committed": 1, "bytes": 7}),
        ([_SAVING, _KILLED], {"saving": 1, "in flight when killed": 1, "bytes": 7}),
        (
            [_SAVING, {"event": "failed", "step": 1, "expected": True}, _BY_ITSELF],
            {"saving": 1, "failed": 1, "bytes": 7},
        ),
        (
            # Orbax tells of one failure in two calls.
            [
                *(_SAVING, {"event": "failed", "step": 1, "expected": True}),
                *(_SAVING | {"step": 2}, _FAILED_AGAIN | {"step": 2, "expected": True}),
                _BY_ITSELF,
            ],
            {
                "saving": 2,
                "failed": 1,
                "not begun, told again of the failure before": 1,
                "bytes": 14,
            },
        ),
        ([{"event": "half retired", "step": 1}, _KILLED], {"half retired": 1}),
    ],
)
def test_what_may_happen_is_counted(tmp_path, events, count):
    found = counts_of(tmp_path, *events)
    assert found.is_good
    assert +found.counts == count


@pytest.mark.parametrize(
    "events",
    [
        [{"event": "lost", "step": 1}, _BY_ITSELF],
        [{"event": "wrong", "step": 1}, _BY_ITSELF],
        [{"event": "flip silent", "step": 1}, _BY_ITSELF],
        [_SAVING, {"event": "failed", "step": 1, "expected": False}, _BY_ITSELF],
        [_SAVING, _FAILED_AGAIN | {"expected": False}, _BY_ITSELF],
        # A save without an outcome, though nobody killed the process; or too many of them.
        [_SAVING, _BY_ITSELF],
        [_SAVING],
        [_SAVING, _SAVING | {"step": 2}, _SAVING | {"step": 3}, _KILLED],
        [{"event": "torn line"}, _BY_ITSELF],
        [{"event": "ended", "ending": "hung"}],
        [{"event": "ended", "ending": "ended with 1"}],
        [{"event": "ended", "ending": "failed to start, with -11"}],
    ],
    ids=str,
)
def test_what_must_not_happen_fails_the_soak(tmp_path, events):
    found = counts_of(tmp_path, *events)
    assert not found.is_good


def test_a_step_is_lost_once_however_often_it_is_missed(tmp_path):
    lost = {"event": "lost", "step": 1}
    assert counts_of(tmp_path, lost, lost, lost | {"step": 2}).lost == 2
