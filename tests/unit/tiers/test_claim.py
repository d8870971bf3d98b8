"""One process at a time writes the snapshots of a process of a run."""

import os
import signal
import subprocess
import sys

import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers import claim
from lazy_orbax.tiers.claim import Claim
from lazy_orbax.tiers.shelf import Shelf

# Takes the claim, forks a child that lives on, and says so.
_HOLDER = """
import os, sys
from lazy_orbax.tiers.claim import Claim
from lazy_orbax.tiers.shelf import Shelf
taken = Claim(Shelf(sys.argv[1]), "/run", 0)
child = os.fork()
if child == 0:
    sys.stdin.read()
    os._exit(0)
print(child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(place):
    """Another process that has the claim of process 0, and a child."""
    command = [sys.executable, "-c", _HOLDER, place]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
        child = int(one.stdout.readline())
        yield one, child
        one.kill()


def test_a_second_trainer_of_the_same_run_is_refused_and_the_first_named(
    place, holder, monkeypatch
):
    monkeypatch.setattr(claim, "_PATIENCE_S", 0.0)
    with pytest.raises(KeeperError, match=f"pid {holder[0].pid}"):
        Claim(Shelf(place), "/run", 0)
    for run, process in (("/run", 1), ("/other", 0)):
        Claim(Shelf(place), run, process).release()


def test_a_killed_trainer_has_it_no_more_though_its_child_lives(place, holder):
    one, child = holder
    one.send_signal(signal.SIGKILL)
    one.wait()
    Claim(Shelf(place), "/run", 0).release()
    os.kill(child, 0)  # It was there all the time.


def test_a_second_one_in_the_same_process_is_refused_until_the_first_lets_go(place):
    first = Claim(Shelf(place), "/run", 0)
    with pytest.raises(KeeperError, match="close it"):
        Claim(Shelf(place), "/run", 0)
    first.release()
    first.release()
    Claim(Shelf(place), "/run", 0).release()
    assert not os.path.exists(place)


def test_one_that_was_forgotten_is_let_go_of(place):
    Claim(Shelf(place), "/run", 0)
    Claim(Shelf(place), "/run", 0).release()


def test_a_keeper_that_ends_leaves_the_claim_of_a_trainer(place, holder, monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE_S", 0.0)
    Shelf(place).remove_all()
    with pytest.raises(KeeperError, match="another process"):
        Claim(Shelf(place), "/run", 0)
    holder[0].kill()
    holder[0].wait()
    Shelf(place).remove_all()
    assert not os.path.exists(place)
