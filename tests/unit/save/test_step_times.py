"""Step times beside saves, by a clock that moves when it is told to."""

import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.save import step_times
from lazy_orbax.save.step_times import StallReport, StepTimes
from lazy_orbax.timeline import Recorder


class Loop:
    """A loop of steps that take as long as a test says."""

    def __init__(self):
        self.now_s = 10.0
        self.times = StepTimes(clock=lambda: self.now_s)
        self.times.tick()

    def step(self, *durations_s):
        for duration_s in durations_s:
            self.now_s += duration_s
            self.times.tick()


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def recorded():
    """The stalls that are recorded."""
    found = []

    def note(event, duration_secs, **_):
        if event == "/jax/orbax/write/lazy_stall_secs":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


def save(path="/run/1"):
    recorder = Recorder(path, None)
    step_times.note_begun(recorder)
    return recorder


def test_steps_without_saves_are_quiet(loop):
    loop.step(1, 3, 2)
    assert loop.times.report() == StallReport(3, 0, 2, None, (), ())


def test_a_stall_is_what_steps_took_longer_from_the_beginning_of_a_save_to_its_end(loop, recorded):
    loop.step(1, 1, 1)
    recorder = save()
    recorder.note(enqueued_s=0.5)
    loop.step(2, 4)
    recorder.end(committed=True)
    loop.step(1.5, 1, 1)
    assert loop.times.report() == StallReport(8, 3, 1, 2, (4.5,), (0.5,))
    assert recorded == [4.5]


def test_saves_that_overlap_are_one_stall(loop):
    loop.step(1)
    first, second = save("/run/1"), save("/run/2")
    loop.step(2)
    first.end(committed=True)
    loop.step(2)
    second.end(committed=True)
    loop.step(2, 1)
    assert loop.times.report().stalls_s == (3,)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_of_several_processes_one_alone_hears_when_a_step_is_published(
    loop, monkeypatch, n_processes
):
    """The others hear of it at their next save: what they have written is over for them."""
    monkeypatch.setattr(jax, "process_count", lambda: n_processes)
    loop.step(1)
    recorder = save()
    recorder.mark("durable")
    loop.step(2, 1, 1)
    assert loop.times.report().n_saving == (0 if n_processes == 1 else 1)
    recorder.end(committed=True)
    loop.step(1)
    assert loop.times.report().n_saving == (4 if n_processes == 1 else 1)


def test_a_save_that_is_over_within_a_step_counts(loop):
    loop.step(1)
    save().end(committed=True)
    loop.step(3)
    assert loop.times.report().stalls_s == (2,)


def test_where_no_step_is_quiet_there_is_no_telling(loop, recorded):
    recorder = save()
    loop.step(2)
    recorder.end(committed=True)
    loop.step(2)
    assert loop.times.report() == StallReport(2, 2, None, 2, (), ())
    assert recorded == []


def test_a_save_before_the_first_step_is_not_looked_at():
    now_s = [0.0]
    times = StepTimes(clock=lambda: now_s[0])
    save()
    times.tick()
    now_s[0] = 1.0
    times.tick()
    assert times.report() == StallReport(1, 0, 1, None, (), ())


def test_saves_that_begin_when_nobody_times_steps_any_more_are_let_go(loop):
    first = weakref.ref(save())
    for _ in range(step_times._MOST_OPEN):
        save()
    assert first() is None
    loop.step(1)
    assert loop.times.report().n_steps == 0  # They are still under way.


def test_a_real_save_is_seen(tmp_path, loop):
    loop.step(1)
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.standard_handler()) as manager:
        manager.save(0, args=ocp.args.StandardSave({"x": np.arange(4)}))
        loop.step(2)
        manager.wait_until_finished()
        loop.step(3)
    report = loop.times.report()
    assert report.stalls_s == (3,)
    assert report.in_save_s[0] > 0
