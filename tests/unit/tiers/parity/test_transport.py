"""Who does not know the secret gets nothing, and a call always ends."""

import concurrent.futures
import contextlib
import errno
import http.client
import itertools
import select
import shutil
import socket
import subprocess
import threading

import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity import peer as asking
from lazy_orbax.tiers.parity import transport
from lazy_orbax.tiers.parity.peer import Peer
from lazy_orbax.tiers.parity.transport import CHUNK_BYTES, Server

SECRET = "0123456789abcdef"
CONTENT = bytes(range(256)) * (3 * CHUNK_BYTES // 256) + b"rest"


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
        return digest_of_bytes(CONTENT[first:end]), memoryview(CONTENT[first:end])


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


def content_of(peer, n_bytes):
    """Each chunk is there until the next one is asked for."""
    return b"".join(bytes(chunk) for chunk, _ in peer.read({}, n_bytes, timeout_s=30))


@pytest.mark.parametrize("span", [CHUNK_BYTES, 2 * CHUNK_BYTES, transport.SPAN_BYTES])
@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(CONTENT)])
def test_bytes_come_in_turn(peer, desk, n_bytes, span, monkeypatch):
    monkeypatch.setattr(asking, "SPAN_BYTES", span)
    assert content_of(peer, n_bytes) == CONTENT[:n_bytes]
    assert len(desk.asked) == -(-n_bytes // CHUNK_BYTES)


def test_bytes_come_in_few_questions_over_one_connection(peer, monkeypatch):
    questions, connections = [], []
    respond = peer._response

    def noted(*args):
        questions.append(args)
        response = respond(*args)
        connections.append(peer._connection.sock)
        return response

    monkeypatch.setattr(peer, "_response", noted)
    monkeypatch.setattr(asking, "SPAN_BYTES", 2 * CHUNK_BYTES)
    assert content_of(peer, len(CONTENT)) == CONTENT
    assert len(questions) == 2
    assert len(set(connections)) == 1


@pytest.mark.parametrize("failed", [0, CHUNK_BYTES, 2 * CHUNK_BYTES])
def test_an_error_on_the_way_is_told_and_the_next_question_answered(peer, failed):
    with pytest.raises(KeeperError, match="overwritten"):
        list(peer.read({"wrong": failed}, len(CONTENT), timeout_s=30))
    assert peer.ask({"x": 5}, timeout_s=30) == {"found": 5}


def test_who_stops_in_the_middle_may_ask_again(peer):
    chunks = peer.read({}, len(CONTENT), timeout_s=30)
    next(chunks)
    chunks.close()
    assert content_of(peer, len(CONTENT)) == CONTENT


def test_who_was_hung_up_on_between_two_questions_connects_again(server, peer):
    """As whoever asks nothing for long: the stripe of another member may take minutes."""
    for _ in range(3):
        assert peer.ask({"x": 5}, timeout_s=30) == {"found": 5}
        for connection in list(server._open):
            transport._hang_up(connection)
        assert select.select([peer._connection.sock], [], [], 60)[0]
    assert content_of(peer, CHUNK_BYTES) == CONTENT[:CHUNK_BYTES]


def test_nobody_is_sent_more_at_once_than_a_span(peer, monkeypatch):
    monkeypatch.setattr(asking, "SPAN_BYTES", 2 * transport.SPAN_BYTES)
    with pytest.raises(KeeperError, match=f"and {transport.SPAN_BYTES} at once at most"):
        list(peer.read({}, transport.SPAN_BYTES + 1, timeout_s=30))


def test_who_sends_less_than_was_wanted_is_found_out(peer):
    with pytest.raises(KeeperError, match="not what was asked for"):
        list(peer.read({}, len(CONTENT) + 5, timeout_s=30))


def test_a_bit_that_changes_on_the_way_is_found(peer, monkeypatch):
    came = asking._next_part

    def flipped(response, room):
        head, chunk = came(response, room)
        chunk[-3] ^= 1
        return head, chunk

    monkeypatch.setattr(asking, "_next_part", flipped)
    with pytest.raises(KeeperError, match="not what was asked for"):
        list(peer.read({}, 1000, timeout_s=30))


def test_a_stranger_gets_nothing(server, desk):
    stranger = Peer(server.address, "a" * 16, None)
    with pytest.raises(KeeperError, match="403"):
        stranger.ask({"x": 1}, timeout_s=30)
    with pytest.raises(KeeperError, match="403"):
        list(stranger.read({"x": 1}, 5, timeout_s=30))
    assert desk.asked == []
    stranger.close()


@pytest.mark.parametrize(
    ("path", "length"), [("/ask", 10**6), ("/ask", -5), ("/ask", "x"), ("/", 5), ("/ask", 10**30)]
)
def test_a_stranger_makes_nobody_take_memory(server, desk, path, length):
    """What is longer than any question is refused before it is read."""
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert desk.asked == []


def test_a_stranger_sends_no_long_head(server, desk):
    """Python's server would take a hundred lines of 64 KiB, from each of 256 connections."""
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.putrequest("POST", "/ask")
    for name in ("a", "b"):
        connection.putheader(name, "x" * (transport._LONGEST_HEAD_BYTES // 2))
    connection.putheader("Content-Length", "1000000")  # For which it would be told 413.
    with pytest.raises(ConnectionError):
        connection.endheaders()
        connection.getresponse()
    connection.close()
    assert desk.asked == []


@pytest.mark.parametrize("sent", [b"", b"POST /ask HTTP/1.1\r\n", b"\0" * 1000])
def test_a_stranger_who_says_little_is_hung_up_on(desk, monkeypatch, sent):
    monkeypatch.setattr(transport, "_STRANGER_S", 0.1)
    server = Server("127.0.0.1", SECRET, None, desk.answer, desk.read)
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as stranger:
        stranger.sendall(sent)
        while stranger.recv(10_000):
            pass
    server.close()


def test_who_was_answered_once_may_not_say_little_for_ever(desk, monkeypatch):
    """It may be a stranger who sends again what a member did."""
    monkeypatch.setattr(transport, "_IDLE_S", 0.2)
    server = Server("127.0.0.1", SECRET, None, desk.answer, desk.read)
    member, is_over = Peer(server.address, SECRET, None), threading.Event()
    assert member.ask({"x": 1}, timeout_s=30) == {"found": 1}

    def drip():
        with contextlib.suppress(OSError):
            while not is_over.wait(0.01):
                member._connection.sock.sendall(b"x")
        assert not is_over.is_set(), "it is listened to for ever"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        dripping = pool.submit(drip)
        concurrent.futures.wait([dripping], 30)
        is_over.set()
        dripping.result()
    member.close()
    server.close()


def test_there_are_only_so_many_connections(desk, monkeypatch):
    monkeypatch.setattr(transport, "_MOST_CONNECTIONS", 2)
    server = Server("127.0.0.1", SECRET, None, desk.answer, desk.read)
    peers = [Peer(server.address, SECRET, None) for _ in range(3)]
    for peer in peers[:2]:
        assert peer.ask({"x": 1}, timeout_s=30) == {"found": 1}
    with pytest.raises(KeeperError, match="does not answer"):
        peers[2].ask({"x": 1}, timeout_s=30)
    for peer in peers:
        peer.close()
    server.close()


def test_a_server_sends_no_more_than_was_asked_for(server, peer):
    server.answers[transport.READ] = lambda told: iter([({}, bytes(5000))])
    with pytest.raises(KeeperError, match="sends 5000 bytes, wanted 100"):
        list(peer.read({}, 100, timeout_s=30))


def test_who_says_more_than_was_asked_for_is_no_member(server, peer):
    server.answers[transport.ASK] = lambda told: iter([({}, b""), ({}, b"")])
    with pytest.raises(KeeperError, match="more than was asked for"):
        peer.ask({"x": 1}, timeout_s=30)


def test_an_answer_to_another_question_is_not_believed(peer, monkeypatch):
    """Such as one that somebody in between has kept."""
    came, kept = asking._next_part, []

    def between(*args):
        kept.append(came(*args))
        return kept[0]

    monkeypatch.setattr(asking, "_next_part", between)
    assert peer.ask({"x": 1}, timeout_s=30) == {"found": 1}
    with pytest.raises(KeeperError, match="no member"):
        peer.ask({"x": 1}, timeout_s=30)


def test_parts_of_an_answer_cannot_change_places(peer, monkeypatch):
    """Each is proven with the one before."""
    monkeypatch.setattr(asking, "CHUNK_BYTES", 5)
    monkeypatch.setattr(transport, "CHUNK_BYTES", 5)
    came, seen = asking._next_part, []

    def between(response, room):
        if not seen:
            seen.extend(
                (head, bytes(chunk)) for head, chunk in (came(response, room) for _ in "ab")
            )
            assert [chunk for _, chunk in seen] == [CONTENT[:5], CONTENT[5:10]]
        head, chunk = seen.pop()
        room[:] = chunk
        return head, room

    monkeypatch.setattr(asking, "_next_part", between)
    with pytest.raises(KeeperError, match="no member"):
        list(peer.read({}, 10, timeout_s=30))


@pytest.mark.parametrize("n_failures", [1, 2])
def test_who_was_not_found_is_looked_for_once_more(peer, monkeypatch, n_failures):
    """The kernel remembers for a moment that it found nobody, when the network is there again."""
    connect, left = peer._connection.connect, list(range(n_failures))

    def connected():
        if left:
            left.pop()
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        connect()

    monkeypatch.setattr(peer._connection, "connect", connected)
    if n_failures == 1:
        assert peer.ask({"x": 1}, timeout_s=30) == {"found": 1}
    else:
        with pytest.raises(KeeperError, match="No route to host"):
            peer.ask({"x": 1}, timeout_s=30)


def test_the_kernel_finds_out_who_is_silent(peer):
    peer.ask({"x": 1}, timeout_s=30)
    option = peer._connection.sock.getsockopt
    assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
    assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5


def test_who_takes_connections_and_says_nothing_is_given_up():
    """A machine that is half gone: its kernel still answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Peer(f"127.0.0.1:{silent.getsockname()[1]}", SECRET, None)
        for call in (
            lambda: peer.ask({"x": 1}, timeout_s=0.2),
            lambda: list(peer.read({"x": 1}, 5, timeout_s=0.2)),
        ):
            with pytest.raises(KeeperError, match="does not answer"):
                call()
        peer.close()


def _drip():
    while True:
        yield b"x"


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"HTTP/1.1 200 OK\r\n", _drip()),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n\xff\xff\0\0\0\0", _drip()),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", _drip()),
        (b"", itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n")),
    ],
)
def test_who_goes_on_sending_for_ever_is_given_up(first, rest):
    """A byte in time keeps no wait from its end."""
    is_over = threading.Event()

    def send(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(first)
            while not is_over.wait(0.01):
                connection.sendall(next(rest))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = threading.Thread(target=send, args=(listener,), daemon=True)
        sender.start()
        peer = Peer(f"127.0.0.1:{listener.getsockname()[1]}", SECRET, None)
        failure = []

        def ask():
            with pytest.raises(KeeperError, match="does not answer") as told:
                peer.ask({"x": 1}, timeout_s=0.2)
            failure.append(told)

        asker = threading.Thread(target=ask, daemon=True)
        asker.start()
        asker.join(60)
        is_over.set()
        assert failure
        sender.join()
        peer.close()


def test_a_member_that_hangs_in_its_answer_is_given_up(desk):
    held = threading.Event()
    server = Server("127.0.0.1", SECRET, None, lambda _: held.wait(60) and {}, desk.read)
    peer = Peer(server.address, SECRET, None)
    with pytest.raises(KeeperError, match="does not answer"):
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


def test_it_listens_on_the_interface_that_it_is_told_of_ipv6(desk, tls6):
    for host, tls in (("::1", None), ("[::1]", None), ("::1", tls6)):
        server = Server(host, SECRET, tls, desk.answer, desk.read)
        member = Peer(server.address, SECRET, tls)
        assert server.address.startswith("[::1]:")
        assert member.ask({"x": 1}, timeout_s=30) == {"found": 1}
        assert content_of(member, CHUNK_BYTES + 1) == CONTENT[: CHUNK_BYTES + 1]
        member.close()
        server.close()


def test_it_listens_at_one_of_the_addresses_of_a_name(desk, monkeypatch):
    """At the first one at which it can. Who comes by the name finds it at that."""
    resolve, found = socket.getaddrinfo, ["192.0.2.1", "127.0.0.2", "127.0.0.1"]

    def resolved(host, port, *args, **kwargs):
        hosts = found if host == "several" else [host]
        return [one for each in hosts for one in resolve(each, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    server = Server("several", SECRET, None, desk.answer, desk.read)
    assert server.socket.getsockname()[0] == "127.0.0.2"
    found.remove("192.0.2.1")  # Whose network would take long to be given up.
    found.reverse()
    member = Peer(server.address, SECRET, None)
    assert member.ask({"x": 1}, timeout_s=30) == {"found": 1}
    member.close()
    server.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1%nolink"])
def test_where_nobody_can_listen_it_says_so(desk, host):
    with pytest.raises(KeeperError, match=f"listen on {host}"):
        Server(host, SECRET, None, desk.answer, desk.read)


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificate_of("127.0.0.1", tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls6(tmp_path_factory):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"there is no IPv6 here: {error}")
    return certificate_of("::1", tmp_path_factory.mktemp("tls6"))


def certificate_of(host, place):
    """A certificate of this machine, which signed itself."""
    names = [str(place / name) for name in ("certificate", "key")]
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here, which makes the certificate")
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=node", "-addext", f"subjectAltName=IP:{host}"]
    files = ["-out", names[0], "-keyout", names[1]]
    command = ["openssl", "req", "-x509", *options, *name, *files]
    subprocess.run(command, check=True, capture_output=True)
    return (*names, names[0])


def test_with_certificates_all_is_encrypted_and_who_has_none_is_refused(desk, tls):
    server = Server("127.0.0.1", SECRET, tls, desk.answer, desk.read)
    member = Peer(server.address, SECRET, tls)
    assert member.ask({"x": 1}, timeout_s=30) == {"found": 1}
    assert content_of(member, CHUNK_BYTES + 1) == CONTENT[: CHUNK_BYTES + 1]
    assert member._connection.sock.cipher()
    asked = len(desk.asked)
    plain = Peer(server.address, SECRET, None)
    with pytest.raises(KeeperError, match="does not answer"):
        plain.ask({"x": 1}, timeout_s=30)
    assert len(desk.asked) == asked
    for peer in (member, plain):
        peer.close()
    server.close()


def test_certificates_that_are_not_there_are_named(desk):
    with pytest.raises(KeeperError, match="/nowhere"):
        Server("127.0.0.1", SECRET, ("/nowhere", "/key", "/ca"), desk.answer, desk.read)
