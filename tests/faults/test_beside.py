"""Two threads that save, Ctrl-C, a refused save, the end of a process: nothing hangs or is lost."""

import pathlib
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).with_name("beside.py")


def child(case, directory):
    """What a process prints, which must end by itself long before Orbax's threads time out."""
    command = [sys.executable, str(CHILD), case, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
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
