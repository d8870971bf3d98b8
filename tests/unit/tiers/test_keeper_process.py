"""The keeper serves who is allowed to ask, cuts off who is not, and knows when to end."""

import json
import os
import socket

import pytest

from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_process import KeeperProcess, KeeperSettings, main
from lazy_orbax.tiers.shelf import Shelf, file_of
from lazy_orbax.tiers.snapshot_file import Snapshot

FILE = file_of("run", "default", 0, 0)
HELLO = {"do": "hello", "run": "run", "process": 0, "pid": 1}
LINGER_S = 100.0


class Served:
    """A keeper whose turns a test makes, and whose clock it sets."""

    def __init__(self, place, limit_bytes=2**24):
        self.now_s = 0.0
        settings = KeeperSettings(directory=place, limit_bytes=limit_bytes, linger_s=LINGER_S)
        self.shelf = Shelf(place)
        self.keeper = KeeperProcess(self.shelf, settings, clock=lambda: self.now_s)

    def turn(self, n=3):
        for _ in range(n):
            if not self.keeper.is_over:
                self.keeper.turn(timeout_s=0)

    def connect(self):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(self.shelf.socket)
        peer.settimeout(10)
        self.turn()
        return peer

    def say(self, peer, content):
        peer.sendall(content if isinstance(content, bytes) else messages.encoded(content))
        self.turn()

    def ask(self, peer, message):
        self.say(peer, message)
        return json.loads(peer.recv(2**16))

    def hears_nothing(self, peer):
        """Whether the keeper has hung up."""
        try:
            return peer.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def served(place):
    served = Served(place)
    yield served
    served.keeper.is_over = True
    served.keeper.serve()


def test_room_is_made_and_given_back(served):
    with served.connect() as peer:
        assert served.ask(peer, HELLO)["limit_bytes"] == 2**24
        assert served.ask(peer, {"do": "room", "file": FILE, "n_bytes": 2**20}) == {
            "n_bytes": 2**20
        }
        assert served.ask(peer, {"do": "status"})["used_bytes"] == 2**20
        assert served.ask(peer, {"do": "leave", "discard": [FILE]}) == {}
        assert served.keeper.is_over  # Nobody is left, and nothing.
    assert not os.path.exists(served.shelf.path)


def test_it_stays_for_another_client_and_for_what_is_kept(served):
    with served.connect() as one, served.connect() as other:
        served.ask(one, HELLO)
        served.ask(other, HELLO)
        served.ask(other, {"do": "room", "file": FILE, "n_bytes": 4096})
        served.ask(one, {"do": "leave", "discard": []})
        assert not served.keeper.is_over
        served.ask(other, {"do": "leave", "discard": []})
        assert not served.keeper.is_over
    assert served.shelf.files() == [FILE]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"do": "room", "file": "../x", "n_bytes": 1}, "not the name"),
        ({"do": "room", "file": FILE, "n_bytes": 2**25}, "limit is"),
        ({"do": "room", "file": FILE}, "n_bytes"),
        ({"do": "room", "file": FILE, "n_bytes": "many"}, "many"),
        ({"do": "dance"}, "dance"),
        ({}, "do"),
        (b"[]\n", "object"),
        (b"\xff\xfe\n", "JSON"),
        (b"[" * 60000 + b"\n", "JSON"),
    ],
)
def test_what_is_not_understood_is_answered_and_changes_nothing(served, message, said):
    with served.connect() as peer:
        served.ask(peer, HELLO)
        served.say(peer, message)
        assert said in json.loads(peer.recv(2**16))["error"]
        assert served.ask(peer, {"do": "status"})["used_bytes"] == 0


def test_a_stranger_is_turned_away_before_a_word(served, monkeypatch):
    monkeypatch.setattr(messages, "user_of", lambda peer: os.geteuid() + 1)
    with served.connect() as peer:
        assert served.hears_nothing(peer)
    assert served.keeper.clients == []


def test_the_kernel_says_who_is_there(served):
    with served.connect():
        assert messages.user_of(served.keeper.clients[0].peer) == os.geteuid()


def test_a_message_without_end_is_cut_off(served):
    with served.connect() as peer:
        peer.settimeout(0.5)
        sent = 0
        while served.keeper.clients:
            sent += peer.send(b"x" * 2**14)
            served.turn(1)
        assert sent <= 2**18
        assert served.hears_nothing(peer)


def test_one_who_says_nothing_is_cut_off_and_others_are_served_meanwhile(served):
    with served.connect() as silent, served.connect() as half, served.connect() as good:
        served.say(half, b'{"do": "hel')
        served.ask(good, HELLO)
        served.now_s = 5.5
        served.turn()
        assert served.hears_nothing(silent)
        assert served.hears_nothing(half)
        assert served.ask(good, {"do": "status"})["clients"][0]["run"] == "run"


def test_one_who_never_reads_is_cut_off(served):
    with served.connect() as peer:
        served.say(peer, HELLO)
        for _ in range(10**4):
            if not served.keeper.clients:
                break
            served.say(peer, {"do": "status"})
        assert served.keeper.clients == []


def test_it_keeps_what_a_dead_client_had_and_ends_when_nobody_comes_back(served):
    with served.connect() as peer:
        served.ask(peer, HELLO)
        served.ask(peer, {"do": "room", "file": FILE, "n_bytes": 4096})
        served.now_s = 10 * LINGER_S
        served.turn()
    served.now_s += LINGER_S / 2
    served.turn()
    assert served.shelf.files() == [FILE]
    with served.connect() as peer:  # It came back: the time begins anew.
        served.ask(peer, HELLO)
    served.turn()
    served.now_s += LINGER_S
    served.turn()
    assert served.shelf.files() == [FILE]
    served.now_s += LINGER_S / 2
    served.turn()
    assert served.keeper.is_over
    assert not os.path.exists(served.shelf.path)


def test_one_who_only_looks_does_not_keep_it_alive(served):
    with served.connect() as peer:
        served.ask(peer, {"do": "status"})
        served.now_s = LINGER_S + 1
        served.turn()
        assert served.keeper.is_over


@pytest.mark.parametrize("discard", [True, False])
def test_it_ends_when_told(served, discard):
    served.shelf.make_room(FILE, 4096, 2**20)
    with served.connect() as peer:
        assert served.ask(peer, {"do": "stop", "discard": discard}) == {}
    assert served.keeper.is_over
    assert os.path.exists(served.shelf.path) is not discard


def test_a_second_keeper_of_a_directory_does_not_begin(served):
    lock = served.shelf.lock()
    told = {"directory": served.shelf.path, "limit_bytes": 2**20, "linger_s": 1.0}
    assert main([json.dumps(told)]) == 3
    os.close(lock)
    served.turn()


def test_a_dead_run_whose_tier_is_full_goes_with_the_keeper(served, monkeypatch):
    class Memory:
        path = served.shelf.path

        def snapshots(self):
            yield FILE, Snapshot(FILE, 1, {"run": "run"}, {}, 0)

    class Failing:
        def poll(self):
            return 1

    promotions = served.keeper._programs[1]
    monkeypatch.setattr(promotions, "_shelf", Memory())
    monkeypatch.setattr(promotions, "_started", lambda run, tier: Failing())
    promotions.came("run", [{"path": "/nvme", "every_s": 10.0, "keep": 1}], 0.0)
    for served.now_s in range(0, int(LINGER_S), 5):
        served.turn(1)
        assert not served.keeper.is_over
    for served.now_s in range(int(LINGER_S), int(2 * LINGER_S), 5):
        served.turn(1)
    assert served.keeper.is_over
