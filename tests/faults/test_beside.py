"""Two threads that save, Ctrl-C, a refused save, the end of a process: nothing hangs or is lost."""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

CHILD = pathlib.Path(__file__).with_name("beside.py")


def run(case, directory):
    """A process, which must end by itself long before Orbax's threads time out."""
    command = [sys.executable, str(CHILD), case, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def child(case, directory):
    """What it prints."""
    done = run(case, directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_two_managers_may_save_from_two_threads(tmp_path):
    assert eval(child("two threads", tmp_path)) == {name: [0, 1, 2, 3, 4] for name in "ab"}


def test_a_save_after_an_interrupted_wait_leaves_the_one_before_whole(tmp_path):
    assert child("interrupted", tmp_path).splitlines() == ["interrupted", "['1', '2']"]


@pytest.mark.parametrize("case", ["refused", "refused, closed", "refused by Orbax"])
def test_a_process_ends_after_a_refused_save(tmp_path, case):
    assert child(case, tmp_path) in ("TreeError", "ValueError")


def test_a_save_after_the_main_thread_says_what_to_do(tmp_path):
    assert "join the threads that save" in child("main thread ends", tmp_path)


@pytest.mark.parametrize(
    ("case", "code", "printed"),
    [
        ("in flight", 0, "the end"),
        ("in flight, raises", 1, ""),
        pytest.param("in flight, exits", 3, "", marks=pytest.mark.slow),
        pytest.param("in flight, interrupted", -signal.SIGINT, "", marks=pytest.mark.slow),
        ("in flight, forks", 0, "a child\nexit code 0\nthe end"),
    ],
)
def test_a_save_in_flight_when_the_main_thread_ends_is_finished(tmp_path, case, code, printed):
    """Stock Orbax loses it, with a traceback of its executors."""
    done = run(case, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (code, printed)
    assert "it is finished first" in done.stderr
    assert "cannot schedule" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    with ocp.StandardCheckpointer() as stock:
        np.testing.assert_array_equal(stock.restore(tmp_path / "0")["y"], np.arange(5))


def test_ctrl_c_gives_up_a_save_that_is_finished_first(tmp_path):
    done = run("in flight, for ever", tmp_path)
    assert done.stdout.strip() == "the end"
    assert "KeyboardInterrupt" in done.stderr
    assert not (tmp_path / "0").exists()


def test_a_save_that_fails_after_the_main_thread_has_ended_is_told_of_in_the_log(tmp_path):
    done = run("in flight, fails", tmp_path)
    assert "has failed" in done.stderr
    assert "the disk is gone" in done.stderr
    assert not (tmp_path / "0").exists()
