"""What is said over the socket is short, is JSON, and is not waited for without end."""

import os
import socket
import threading

import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers import messages


def answered_by(content, **keywords):
    """Returns what `asked` makes of an answer."""
    mine, other = socket.socketpair()
    with mine, other:
        other.sendall(content)
        if content == b"":
            other.close()
        return messages.asked(mine, {"do": "it"}, **{"timeout_s": 30, **keywords})


def test_an_answer_is_returned():
    assert answered_by(b'{"x": 1}\n') == {"x": 1}


def test_a_refusal_is_raised():
    with pytest.raises(KeeperError, match="too large"):
        answered_by(b'{"error": "too large"}\n')


@pytest.mark.parametrize("content", [b"", b"[]\n", b"no\n", b"x" * (2**16 + 1)])
def test_what_is_no_answer_is_a_failure_of_the_connection(content):
    with pytest.raises(OSError, match=r"it|Broken"):
        answered_by(content)


def test_one_who_answers_byte_by_byte_is_not_waited_for():
    mine, other = socket.socketpair()
    ended = threading.Event()

    def drip():
        while not ended.wait(0.01):
            other.send(b" ")

    thread = threading.Thread(target=drip)
    with mine, other:
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                messages.asked(mine, {}, timeout_s=0.2)
        finally:
            ended.set()
            thread.join()


def test_a_long_message_is_not_sent():
    with pytest.raises(KeeperError, match="at most"):
        messages.encoded({"x": "y" * 2**16})


def test_a_stranger_is_refused(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        messages.refuse_strangers(one)
        monkeypatch.setattr(messages, "user_of", lambda peer: os.geteuid() + 1)
        with pytest.raises(KeeperError, match=f"wanted user {os.geteuid()}"):
            messages.refuse_strangers(one)
