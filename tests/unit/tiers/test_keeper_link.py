"""A keeper is a program of its own: started when there is none, found when there is one."""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers import keeper_link, messages
from lazy_orbax.tiers.keeper_link import KeeperLink, connected
from lazy_orbax.tiers.keeper_process import KeeperSettings
from lazy_orbax.tiers.shelf import Shelf, file_of

FILE = file_of("run", "default", 0, 0)


def link_to(place):
    settings = KeeperSettings(directory=place, limit_bytes=2**24, linger_s=60.0)
    return KeeperLink(settings, {"run": "run", "process": 0, "pid": os.getpid()})


def await_end(pid):
    """Waits until a process that is no child of ours has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        assert select.select([descriptor], [], [], 60)[0]
    finally:
        os.close(descriptor)


def test_a_keeper_outlives_a_killed_one_and_knows_nothing_of_jax(place):
    link = link_to(place)
    told = link.ask({"do": "status"})
    assert told["heavy"] == []
    assert told["pid"] != os.getpid()
    # In a session of its own: no signal to our group reaches it.
    assert os.getsid(told["pid"]) != os.getsid(0)
    link.ask({"do": "room", "file": FILE, "n_bytes": 4096})
    other = link_to(place)
    assert other.ask({"do": "status"})["pid"] == told["pid"]
    other.close()

    os.kill(told["pid"], signal.SIGKILL)
    await_end(told["pid"])
    again = link.ask({"do": "status"})
    assert again["pid"] != told["pid"]
    assert again["used_bytes"] == 4096  # What was kept is where it was.
    link.ask({"do": "leave", "discard": [FILE]})
    link.close()
    await_end(again["pid"])
    assert not os.path.exists(place)


def test_without_a_keeper_one_who_does_not_start_any_is_told(place):
    with pytest.raises(KeeperError, match="no keeper"):
        link_to(place).ask({"do": "status"}, starts=False)


def test_why_a_keeper_does_not_start_is_told(place, monkeypatch):
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(KeeperError, match="/no/such/python"):
        link_to(place).ask({"do": "status"})


def test_what_a_keeper_says_before_it_dies_is_told(place):
    Shelf(place)
    os.mkdir(f"{place}/socket")
    with pytest.raises(KeeperError, match="socket"):
        link_to(place).ask({"do": "status"})
    os.rmdir(f"{place}/socket")


def test_a_refusal_leaves_the_connection_as_it_is(served):
    link = link_to(served)
    pid = link.ask({"do": "status"})["pid"]
    with pytest.raises(KeeperError, match="limit"):
        link.ask({"do": "room", "file": FILE, "n_bytes": 2**40})
    told = link.ask({"do": "status"})
    assert (told["pid"], len(told["clients"])) == (pid, 1)
    link.close()


def test_the_keeper_of_another_user_is_not_talked_to(served, monkeypatch):
    monkeypatch.setattr(messages, "user_of", lambda peer: os.geteuid() + 1)
    with pytest.raises(KeeperError, match="wanted user"):
        connected(served)
    with pytest.raises(KeeperError, match="wanted user"):
        link_to(served).ask({"do": "status"})
    monkeypatch.undo()


def test_a_keeper_that_does_not_answer_is_given_up(place, monkeypatch):
    monkeypatch.setattr(keeper_link, "_ANSWER_S", 0.2)
    shelf = Shelf(place)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(shelf.socket)
        deaf.listen()
        with pytest.raises(KeeperError, match="does not answer"):
            link_to(place).ask({"do": "status"})


def test_a_forked_child_does_not_keep_the_connection(served):
    """A loader of data that outlives its trainer is no trainer."""
    whose = {"run": "/run", "process": 0, "pid": 7}
    program = f"""
import os, sys
from lazy_orbax.tiers.keeper_link import KeeperLink
from lazy_orbax.tiers.keeper_process import KeeperSettings
settings = KeeperSettings(directory={served!r}, limit_bytes=2**20, linger_s=60.0)
link = KeeperLink(settings, {whose!r})
link.ask({{"do": "status"}})
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("forked", flush=True)
os._exit(0)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as one:
        assert one.stdout.readline()
        deadline_s = time.monotonic() + 30
        clients = [whose]
        while clients and time.monotonic() < deadline_s:
            with connected(served) as peer:
                clients = messages.asked(peer, {"do": "status"}, timeout_s=30)["clients"]
        assert clients == []


@pytest.mark.parametrize("remove", [lambda place: os.unlink(Shelf(place).socket), shutil.rmtree])
def test_a_keeper_that_nobody_can_find_makes_way_for_another(place, remove):
    """Else there is no room for anything until the last process of the run has ended."""
    link = link_to(place)
    first = link.ask({"do": "status"})["pid"]
    remove(place)
    await_end(first)
    assert link.ask({"do": "room", "file": FILE, "n_bytes": 4096}) == {"n_bytes": 4096}
    second = link.ask({"do": "status"})["pid"]
    assert link.ask({"do": "stop", "discard": True}) == {}
    link.close()
    await_end(second)
