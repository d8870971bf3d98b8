"""What a soak counts: the checks of it must be able to fail."""

from __future__ import annotations

import collections
import dataclasses
import random

import jax
import orbax.checkpoint as ocp
import pytest

from benchmarks import soak

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


@pytest.fixture
def saved(tmp_path):
    """Two steps that are committed, and the ledger that says so."""
    options = soak._drawn(random.Random(0), tmp_path / "run", tmp_path / "ledger", "mixed")
    ledger, state = soak.Ledger(tmp_path / "ledger"), soak.state_of("mixed")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            ledger.note("saving", step=step, digest=soak.digest_of(state), bytes=1)
            manager.save(step, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            ledger.note("committed", step=step)
    return options, ledger, state


def counted(options, ledger, state):
    before = len(ledger.read())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    soak._check(options, ledger, target)
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
    path.write_text(path.read_text().replace(soak.digest_of(state), "0" * 32, 1))
    assert counted(options, ledger, state) == {"restored": 1, "wrong": 1}


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path):
    ledger = soak.Ledger(tmp_path / "ledger")
    ledger.note("saving", step=1)
    with (tmp_path / "ledger").open("a") as file:
        file.write('{"event": "sav')
    assert [event["step"] for event in ledger.read()] == [1]
