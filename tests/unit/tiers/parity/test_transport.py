"""Who does not know the secret gets nothing, and a call always ends."""

import socket
import threading
import types

import grpc
import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity.transport import CHUNK_BYTES, Peer, Server

SECRET = "0123456789abcdef"
CONTENT = bytes(range(256)) * (10 * 2**20 // 256) + b"rest"


class Desk:
    """Answers; counts who got to it."""

    def __init__(self):
        self.asked = []

    def answer(self, told):
        self.asked.append(told)
        if told.get("wrong"):
            raise KeeperError("there is no such thing")
        return {"found": told["x"]}

    def read(self, told, first, end):
        self.asked.append((first, end))
        if told.get("wrong") == first:
            raise KeeperError("it was overwritten")
        return memoryview(CONTENT[first:end])


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def server(desk):
    server = Server("127.0.0.1", SECRET, None, desk.answer, desk.read)
    yield server
    server.close()


@pytest.fixture
def peer(server):
    peer = Peer(server.address, SECRET, None)
    yield peer
    peer.close()


def test_a_question_is_answered(peer):
    assert peer.ask({"x": 5}, timeout_s=30) == {"found": 5}
    with pytest.raises(KeeperError, match="no such thing"):
        peer.ask({"x": 5, "wrong": True}, timeout_s=30)


@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(CONTENT)])
def test_bytes_come_in_turn(peer, desk, n_bytes):
    parts = list(peer.read({}, n_bytes, timeout_s=30))
    assert b"".join(parts) == CONTENT[:n_bytes]
    assert len(desk.asked) == -(-n_bytes // CHUNK_BYTES)


def test_an_error_on_the_way_is_told(peer):
    with pytest.raises(KeeperError, match="overwritten"):
        list(peer.read({"wrong": 3 * CHUNK_BYTES}, len(CONTENT), timeout_s=30))


def test_who_sends_less_than_was_wanted_is_found_out(peer):
    with pytest.raises(KeeperError, match="not what was asked for"):
        list(peer.read({}, len(CONTENT) + 5, timeout_s=30))


def test_a_bit_that_changes_on_the_way_is_found(peer, monkeypatch):
    call = peer._call

    def flipped(*args):
        request, future = call(*args)
        message = bytearray(future.result())
        message[-3] ^= 1
        return request, types.SimpleNamespace(result=lambda timeout: bytes(message))

    monkeypatch.setattr(peer, "_call", flipped)
    with pytest.raises(KeeperError, match="not what was asked for"):
        list(peer.read({}, 1000, timeout_s=30))


def test_a_stranger_gets_nothing(server, desk):
    stranger = Peer(server.address, "a" * 16, None)
    with pytest.raises(KeeperError, match="UNAUTHENTICATED"):
        stranger.ask({"x": 1}, timeout_s=30)
    with pytest.raises(KeeperError, match="UNAUTHENTICATED"):
        list(stranger.read({"x": 1}, 5, timeout_s=30))
    assert desk.asked == []
    stranger.close()


def test_a_stranger_makes_nobody_take_memory(server, desk):
    """What is longer than any question is refused before it is read."""
    with (
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/lazy_orbax.Parity/Ask")(bytes(10**6), timeout=30)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert desk.asked == []


def test_an_answer_to_another_question_is_not_believed(peer, monkeypatch):
    """Such as one that somebody in between has kept."""
    call, kept = peer._call, []

    def between(*args):
        request, future = call(*args)
        kept.append(future)
        return request, kept[0]

    monkeypatch.setattr(peer, "_call", between)
    assert peer.ask({"x": 1}, timeout_s=30) == {"found": 1}
    with pytest.raises(KeeperError, match="no member"):
        peer.ask({"x": 1}, timeout_s=30)


def test_a_call_that_grpc_lets_hang_is_given_up(peer, monkeypatch):
    call = peer._call

    def hung(*args):
        request, future = call(*args)
        future.result()

        def result(timeout):
            assert timeout < 60
            raise grpc.FutureTimeoutError

        return request, types.SimpleNamespace(result=result)

    monkeypatch.setattr(peer, "_call", hung)
    with pytest.raises(KeeperError, match="did not answer within 30 s"):
        peer.ask({"x": 1}, timeout_s=30)


def test_who_takes_connections_and_says_nothing_is_given_up():
    """A machine that is half gone: its kernel still answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Peer(f"127.0.0.1:{silent.getsockname()[1]}", SECRET, None)
        for call in (
            lambda: peer.ask({"x": 1}, timeout_s=0.2),
            lambda: list(peer.read({"x": 1}, 5, timeout_s=0.2)),
        ):
            with pytest.raises(KeeperError, match=r"DEADLINE_EXCEEDED|UNAVAILABLE|not answer"):
                call()
        peer.close()


def test_a_member_that_hangs_in_its_answer_is_given_up(desk):
    held = threading.Event()
    server = Server("127.0.0.1", SECRET, None, lambda _: held.wait(60) and {}, desk.read)
    peer = Peer(server.address, SECRET, None)
    with pytest.raises(KeeperError, match="DEADLINE_EXCEEDED|not answer"):
        peer.ask({"x": 1}, timeout_s=0.2)
    held.set()
    peer.close()
    server.close()


def test_it_listens_on_the_interface_that_it_is_told(server):
    host, _, port = server.address.rpartition(":")
    assert host == "127.0.0.1"
    # All of 127.0.0.0/8 is this machine; another address of it is another interface.
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", int(port)))


def test_where_nobody_can_listen_it_says_so(desk):
    with pytest.raises(KeeperError, match="listen on 192.0.2.1"):
        Server("192.0.2.1", SECRET, None, desk.answer, desk.read)
