"""A run is completed when its last trainer has been dead for as long as was set, and once."""

import subprocess

import pytest

from lazy_orbax.tiers.completion import Completions, end


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


@pytest.fixture
def completions(monkeypatch):
    completions = Completions("/nowhere")
    completions.started = []

    def start(name):
        completions.started.append((name, program := Program()))
        return program

    monkeypatch.setattr(completions, "_started", start)
    return completions


def test_it_is_completed_once_and_the_keeper_stays_meanwhile(completions):
    completions.came("run", 10.0)
    assert not completions.turn(0.0, {"run"})
    assert completions.turn(5.0, set())
    assert completions.turn(14.9, set())
    assert completions.started == []
    assert completions.turn(15.0, set())
    ((name, program),) = completions.started
    assert name == "run"
    assert completions.turn(1000.0, set())
    program.status = 0
    assert not completions.turn(1001.0, set())
    assert not completions.turn(2000.0, set())
    assert len(completions.started) == 1


def test_a_trainer_that_comes_back_goes_on_itself(completions):
    completions.came("run", 10.0)
    completions.turn(0.0, set())
    completions.came("run", 10.0)
    completions.turn(50.0, {"run"})
    completions.turn(51.0, set())
    assert completions.started == []
    completions.turn(61.0, set())
    ((_, program),) = completions.started
    completions.came("run", 10.0)
    assert program.is_killed


@pytest.mark.parametrize("after_s", [None, 10.0])
def test_a_run_that_ended_well_or_does_not_want_it_is_left_alone(completions, after_s):
    completions.came("run", after_s)
    if after_s is not None:
        completions.left("run")
    assert not completions.turn(0.0, set())
    completions.turn(100.0, set())
    assert completions.started == []


def test_nothing_goes_on_when_the_keeper_ends(completions):
    completions.came("run", 0.0)
    completions.turn(0.0, set())
    completions.turn(0.0, set())
    ((_, program),) = completions.started
    completions.close()
    assert program.is_killed


def test_where_no_program_can_be_started_it_is_tried_again(completions, monkeypatch, caplog):
    def fail(name):
        raise OSError("no memory for a process")

    completions.came("run", 10.0)
    completions.turn(0.0, set())
    with monkeypatch.context() as patch:
        patch.setattr(completions, "_started", fail)
        assert completions.turn(10.0, set())
    assert "no memory" in caplog.text
    assert completions.turn(19.0, set())
    assert completions.started == []
    completions.turn(20.0, set())
    assert len(completions.started) == 1


def test_nobody_waits_for_a_program_that_storage_holds():
    class Held(Program):
        def wait(self, timeout=None):
            assert self.is_killed
            assert 0 < timeout <= 5  # Less than a client has patience for.
            raise subprocess.TimeoutExpired("promoting", timeout)

    end(program := Held())
    assert program.is_killed
