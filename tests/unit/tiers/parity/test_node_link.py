"""A node that hangs holds nobody up: not who asks it, and not who wants to end."""

import fcntl
import os
import signal

import pytest
from equipment.nodes import RUN, key_of

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity import node_link
from lazy_orbax.tiers.parity.node_link import NodeLink
from lazy_orbax.tiers.parity.settings import NodeSettings

LOST = {"do": "lost", "item": "default", "step": 5, "life": 7}


@pytest.fixture
def link(place, monkeypatch):
    monkeypatch.setattr(node_link, "_END_S", 0.1)  # Then it is killed.
    link = NodeLink(NodeSettings(place, RUN, 0, "0123456789abcdef"))
    yield link
    link.close()


def stop(link):
    os.kill(link._program.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, link._program.pid, os.WSTOPPED)


def test_who_is_asked_while_it_is_stopped_answers_later(link):
    stop(link)
    with pytest.raises(KeeperError, match="did not answer within"):
        link.ask(LOST, timeout_s=0.01)
    os.kill(link._program.pid, signal.SIGCONT)
    assert link.ask(LOST, timeout_s=60) == {}
    assert link._asked == {}


@pytest.mark.parametrize("longer", ["", "x" * 30_000])
def test_a_full_pipe_is_waited_for_no_longer_than_an_answer(link, longer):
    """What a stopped node is told of each step fills the pipe at last."""
    fcntl.fcntl(link._program.stdin.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    stop(link)
    for _ in range(100):
        with pytest.raises(KeeperError, match=r"did not answer within|is gone"):
            link.ask({**LOST, "longer": longer}, timeout_s=0.01)
    if longer:  # A message of which only a part was written is the last one.
        link._reading.result(60)
    assert link.is_gone is bool(longer)


def test_a_node_that_does_not_end_its_work_in_time_is_ended(link):
    stop(link)
    ask = {"do": "exchange", "group": [], **vars(key_of(5))}
    with pytest.raises(KeeperError, match="did not answer within"):
        link.ask(ask, timeout_s=0.01)
    assert link._program.wait(60) == -signal.SIGKILL
    link._reading.result(60)
    assert link.is_gone
