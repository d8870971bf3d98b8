"""Each tier gets what is newer at its own pace, one at a time; a dead run's at once."""

import time

import pytest

from lazy_orbax.tiers.promotion import Promotions
from lazy_orbax.tiers.snapshot_file import Snapshot, SnapshotError


class Program:
    """A program that ends when the test says so."""

    def __init__(self):
        self.status, self.is_killed = None, False

    def poll(self):
        return self.status

    def kill(self):
        self.is_killed = True

    def wait(self, timeout=None):
        assert self.is_killed


class Memory:
    """Snapshots of two runs, and a file that holds none."""

    path = "/nowhere"

    def __init__(self):
        self.serial = 0

    def snapshots(self):
        for run in ("run", "other"):
            yield run, Snapshot(run, self.serial, {"run": run}, {}, 0)
        yield "torn", SnapshotError("torn")


NVME = {"path": "/nvme", "every_s": 10.0, "keep": 2}
BUCKET = {"path": "gs://bucket/run", "every_s": 100.0, "keep": None}


@pytest.fixture
def promotions(monkeypatch):
    promotions = Promotions(Memory())
    promotions.started = []

    def start(run, tier):
        promotions.started.append((run, tier["path"], program := Program()))
        return program

    monkeypatch.setattr(promotions, "_started", start)
    return promotions


def paths(promotions):
    return [path for _, path, _ in promotions.started]


def test_each_tier_has_its_own_interval_and_waits_for_no_other(promotions):
    promotions.came("run", [NVME, BUCKET], 0.0)
    assert not promotions.turn(9.9, {"run"})
    assert promotions.turn(10.0, {"run"})
    assert paths(promotions) == ["/nvme"]
    promotions.turn(100.0, {"run"})  # The first has not ended: it is not begun twice.
    assert paths(promotions) == ["/nvme", "gs://bucket/run"]
    assert [told["is_busy"] for told in promotions.told()] == [True, True]


def test_what_is_there_already_is_not_brought_again(promotions):
    promotions.came("run", [NVME], 0.0)
    promotions.turn(10.0, {"run"})
    promotions.started[0][2].status = 0
    assert not promotions.turn(20.0, {"run"})
    assert promotions.told()[0]["status"] == 0
    promotions._shelf.serial += 1
    assert promotions.turn(30.0, {"run"})
    assert len(promotions.started) == 2


def test_what_came_while_one_was_under_way_is_brought_next(promotions):
    promotions.came("run", [NVME], 0.0)
    promotions.turn(10.0, {"run"})
    promotions._shelf.serial += 1
    promotions.started[0][2].status = 0
    promotions.turn(20.0, {"run"})
    assert len(promotions.started) == 2


@pytest.mark.parametrize("status", [1, -9])
def test_what_failed_is_tried_again_at_the_next_turn_of_the_tier(promotions, status):
    promotions.came("run", [NVME], 0.0)
    promotions.turn(10.0, {"run"})
    promotions.started[0][2].status = status
    assert not promotions.turn(15.0, {"run"})
    assert promotions.turn(20.0, {"run"})


def test_what_nobody_is_left_of_is_brought_at_once_and_once(promotions):
    promotions.came("run", [NVME, BUCKET], 0.0)
    assert not promotions.turn(1.0, {"run"})
    assert promotions.turn(2.0, set())
    assert paths(promotions) == ["/nvme", "gs://bucket/run"]
    for _, _, program in promotions.started:
        program.status = 1
    assert not promotions.turn(3.0, set())
    assert len(promotions.started) == 2
    assert promotions.turn(12.0, set())


def test_a_trainer_that_comes_back_finds_it_going_on(promotions):
    promotions.came("run", [NVME, BUCKET], 0.0)
    promotions.turn(10.0, {"run"})
    promotions.came("run", [NVME], 11.0)
    assert promotions.turn(12.0, {"run"})
    assert not promotions.started[0][2].is_killed
    promotions.turn(200.0, {"run"})
    assert paths(promotions) == ["/nvme"]


@pytest.mark.parametrize("ends", [lambda p: p.left("run"), lambda p: p.close()])
def test_at_the_end_nothing_goes_on(promotions, ends):
    promotions.came("run", [NVME], 0.0)
    promotions.turn(10.0, {"run"})
    ends(promotions)
    assert promotions.started[0][2].is_killed
    assert not promotions.turn(100.0, set())
    assert len(promotions.started) == 1


def test_what_fails_for_ever_ends_with_the_keeper(promotions):
    """Else a dead run would stay in memory for as long as its tier is full."""
    promotions.came("run", [NVME], 0.0)
    assert promotions.turn(1.0, set(), is_late=True)  # What it died with is owed.
    promotions.started[0][2].status = 1
    assert not promotions.turn(12.0, set(), is_late=True)
    assert promotions.turn(13.0, set())


def test_where_no_program_can_be_started_the_keeper_goes_on(promotions, monkeypatch, caplog):
    def fail(run, tier):
        raise OSError("no memory for a process")

    promotions.came("run", [NVME], 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(promotions, "_started", fail)
        assert not promotions.turn(10.0, {"run"})
    assert promotions.told()[0]["status"] == 1
    assert "no memory" in caplog.text
    assert promotions.turn(20.0, {"run"})


def test_the_machines_of_a_job_begin_at_the_same_moments(promotions, monkeypatch):
    tier = {**NVME, "machine": {"processes": [0], "of": 2}}
    monkeypatch.setattr(time, "time", lambda: 1234.0)
    promotions.came("run", [tier], 500.0)
    promotions.turn(505.9, {"run"})
    assert paths(promotions) == []
    monkeypatch.setattr(time, "time", lambda: 1240.5)
    promotions.turn(506.5, {"run"})
    assert paths(promotions) == ["/nvme"]
    promotions.started[0][2].status = 1
    promotions.turn(515.9, {"run"})
    assert len(promotions.started) == 1
    promotions.turn(516.0, {"run"})  # At 1250.
    assert len(promotions.started) == 2
