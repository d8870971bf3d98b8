"""Threads of ours: they are taken again, they end, and nobody waits for one that hangs."""

import concurrent.futures
import contextlib
import os
import sys
import threading

import pytest

from lazy_orbax._machine import priority_of_this_thread, yield_to_training
from lazy_orbax.storage import threads
from lazy_orbax.storage.threads import Crew, await_progress

WAIT_S = 30


@pytest.fixture
def started(monkeypatch):
    """The threads that were started."""
    found, start = [], threading.Thread.start

    def note(thread):
        found.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    return found


def test_a_thread_that_has_ended_its_work_is_given_more(started, monkeypatch):
    monkeypatch.setattr(threads, "_IDLE_S", WAIT_S)
    for i in range(20):
        assert threads.run(lambda i=i: i, "lazy_orbax-test").result(WAIT_S) == i
    assert len(started) == 1
    threads.dismiss_idle()
    assert not started[0].is_alive()


def test_a_thread_that_has_nothing_to_do_ends(started):
    threads.run(lambda: None, "lazy_orbax-test").result(WAIT_S)
    started[0].join(WAIT_S)
    assert not started[0].is_alive()
    threads.run(lambda: None, "lazy_orbax-test").result(WAIT_S)
    assert len(started) == 2


def test_what_work_raises_is_told_and_the_thread_lives_on(started):
    def fail():
        raise KeyError("no luck")

    for _ in range(2):
        with pytest.raises(KeyError, match="no luck"):
            threads.run(fail, "lazy_orbax-test").result(WAIT_S)
    assert len(started) == 1


def test_a_thread_has_the_name_of_its_work():
    name = threads.run(lambda: threading.current_thread().name, "lazy_orbax-test").result(WAIT_S)
    assert name == "lazy_orbax-test"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_threads_of_low_priority_do_the_work_of_such_threads_only():
    usual, found = priority_of_this_thread(), []

    def low():
        yield_to_training()
        found.append(threads.run(priority_of_this_thread, "lazy_orbax-test").result(WAIT_S))

    thread = threading.Thread(target=low)
    thread.start()
    thread.join(WAIT_S)
    found.append(threads.run(priority_of_this_thread, "lazy_orbax-test").result(WAIT_S))
    assert found[0] > usual
    assert found[1] == usual


def test_small_work_shares_threads_and_large_work_does_not(started):
    for weight, wanted in (1 / 8, 1), (1.0, 4):
        crew, gate, before = Crew("lazy_orbax-test", 4), threading.Event(), len(started)
        futures = [crew.submit(gate.wait, WAIT_S, weight=weight) for _ in range(8)]
        assert crew._at_work == wanted
        gate.set()
        assert all(future.result(WAIT_S) for future in futures)
        crew.close(WAIT_S)
        assert len(started) - before <= wanted


def test_progress_is_waited_for_and_nothing_else():
    first, second = concurrent.futures.Future(), concurrent.futures.Future()
    asked = iter([True, True, False])
    with pytest.raises(TimeoutError, match=r"nothing moved for 0\.01 s") as raised:
        await_progress(
            [first, second], timeout_s=0.01, what="nothing moved", goes_on=lambda: next(asked)
        )
    assert os.strerror(raised.value.errno) == os.strerror(110)
    first.set_result(1)
    second.set_exception(KeyError())
    await_progress([first, second], timeout_s=0.01, what="nothing moved")


def test_work_that_submits_more_while_it_is_closed_starts_nothing():
    crew = Crew("lazy_orbax-test", 8)
    began, closed, more = threading.Event(), threading.Event(), []

    def work():
        began.set()
        assert closed.wait(WAIT_S)
        more.append(crew.submit(began.clear))

    future = crew.submit(work)
    assert began.wait(WAIT_S)
    closer = threading.Thread(target=crew.close, args=(WAIT_S,))
    closer.start()
    while not crew._is_closed:
        pass
    closed.set()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert future.done()
    assert more[0].cancelled()
    assert crew._at_work == 0


def out_of_threads(_thread):
    raise RuntimeError("can't start new thread")


def test_a_crew_for_which_there_is_no_thread_says_so_and_waits_for_none(monkeypatch):
    crew = Crew("lazy_orbax-test", 8)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", out_of_threads)
        with pytest.raises(RuntimeError, match="new thread"):
            crew.submit(lambda: None)
    assert (crew._at_work, crew._load, len(crew._waiting)) == (0, 0, 0)
    assert crew.submit(lambda: 5).result(WAIT_S) == 5
    crew.close(WAIT_S)


def test_a_crew_goes_on_with_the_threads_that_it_has(monkeypatch):
    crew, gate = Crew("lazy_orbax-test", 8), threading.Event()
    first = crew.submit(gate.wait, WAIT_S)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", out_of_threads)
        second = crew.submit(lambda: 5)
    gate.set()
    assert first.result(WAIT_S)
    assert second.result(WAIT_S) == 5
    crew.close(WAIT_S)
    assert crew._at_work == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
def test_a_child_that_was_forked_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(threads, "_IDLE_S", WAIT_S)
    threads.run(lambda: None, "lazy_orbax-test").result(WAIT_S)
    assert threads._POOL._idle
    if not (child := os.fork()):
        code = 1
        with contextlib.suppress(BaseException):
            code = threads.run(lambda: 7, "lazy_orbax-test").result(WAIT_S)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
