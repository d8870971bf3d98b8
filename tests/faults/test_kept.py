"""`kill -9` of a trainer at random points: the newest whole snapshot is back, bit for bit."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.shelf import Shelf

_HERE = pathlib.Path(__file__).parent


@pytest.fixture
def trainers(tmp_path):
    """A process that forks trainers, and the directory of their keeper."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    directory, run = str(above / "k"), tmp_path / "run"
    path = os.pathsep.join([str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(_HERE / "kept_zygote.py"), str(run), directory],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process:
            yield process, directory
            process.stdin.close()
            assert process.wait(60) == 0
    if os.path.exists(directory):
        with connected(directory) as peer:
            messages.asked(peer, {"do": "stop", "discard": True}, timeout_s=60)
    assert not os.path.exists(directory)
    shutil.rmtree(above)


def life(process, rng, *, most_kept):
    """One life of a trainer. Returns what it restored, from where, and the last step it kept."""
    process.stdin.write("\n")
    process.stdin.flush()
    pid = int(process.stdout.readline().split()[1])
    _, step, tier = process.stdout.readline().split()
    kept = int(step)
    for _ in range(rng.randrange(1, most_kept)):
        word, *rest = process.stdout.readline().split()
        assert word == "kept", (word, rest)
        kept = int(rest[0])
    time.sleep(rng.random() / 100)  # Somewhere in the copies that follow.
    os.kill(pid, signal.SIGKILL)
    while (words := process.stdout.readline().split())[0] == "kept":
        kept = int(words[1])
    assert words == ["died", str(int(signal.SIGKILL))]
    return int(step), tier, kept


def die_often(trainers, tell, n):
    process, directory = trainers
    rng = random.Random(n)
    last, lost = 0, []
    for i in range(n):
        step, tier, kept = life(process, rng, most_kept=6)
        # There is no storage: whatever comes back is from memory.
        assert (tier == "memory") == (i > 0)
        assert step >= last
        lost.append(step - last)
        last = kept
        if i == n // 2:  # A keeper that is killed as well takes nothing with it.
            with connected(directory) as peer:
                pid = messages.asked(peer, {"do": "status"}, timeout_s=60)["pid"]
            os.kill(pid, signal.SIGKILL)
    assert len(Shelf(directory).files()) == 2
    tell("trainers killed", f"{n} kills", f"{last} steps", f"{sum(lost)} more than were told of")


def test_the_newest_whole_snapshot_is_back_after_each_kill(trainers, tell):
    die_often(trainers, tell, 4)


@pytest.mark.slow
def test_the_newest_whole_snapshot_is_back_after_a_hundred_kills(trainers, tell):
    die_often(trainers, tell, 100)
