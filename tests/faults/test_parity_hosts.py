"""Machines are lost, each with its processes, its memory and its address: a group goes on.

Nobody there answers any more, not even that nobody is there. It happens at rest and at every stage
of an exchange, of the machine that is lost and of the others.
"""

import concurrent.futures
import json
import re
import socket
import threading

import numpy as np
import pytest
from equipment.hosts import network
from equipment.nodes import ITEM

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity import survey

MEMBER = "equipment.member.Member"
MEMORY = "equipment.hosts_zygote.Memory"
MODULES = ("equipment.member",)
# The stage that is reached by the machine that is lost, or by another.
STAGES = (
    "rest",
    *(
        (stage, who)
        for stage in ("stripe", "asked", "pulled", "sealed")
        for who in ("other", "own")
    ),
)


class Group:
    """Processes that keep parity of each other, each on a machine of its own."""

    def __init__(self, net, n, address=None, timeout_s=60.0):
        self.net, self.n, self._timeout_s = net, n, timeout_s
        self._address = address
        self._pool = concurrent.futures.ThreadPoolExecutor(n)
        self.hosts, self.addresses = [None] * n, [""] * n
        self.each(self.replace)

    def each(self, work, *parts):
        """Runs something of each process at once."""
        return list(self._pool.map(work, range(self.n), *parts))

    def does(self, method, *parts, but=None):
        """Has each process but one do something."""

        def one(i, *of_mine):
            return None if i == but else self.hosts[i].does(MEMBER, method, *of_mine)

        return self.each(one, *parts)

    def replace(self, process):
        """Puts an empty machine in the place of one that is lost."""
        host = self.hosts[process] = self.net.host()
        address = host.address
        if self._address is not None:
            address = self._address.format(host.number)
            bare = address.strip("[]").partition("%")[0]
            host.does("equipment.hosts_zygote.Addresses", "add", f"{bare}/64")
        told = (process, self.n, address, self._timeout_s)
        self.addresses[process] = host.does(MEMBER, "start", *told)

    def restart_nodes(self, but):
        found = self.does("restart_node", but=but)
        self.addresses = [new or old for new, old in zip(found, self.addresses, strict=True)]

    def begin(self, step):
        group = list(enumerate(self.addresses))
        self.does("begin", [step] * self.n, [group] * self.n)

    def exchange(self, step):
        self.begin(step)
        return self.does("ended")

    def whole(self):
        """Makes whole what can be, and returns which step that is, and the bytes of all."""
        found, missing = survey.plans(self.does("listing"), [ITEM], None)
        assert found, missing
        for lost in found[0].lost:
            told = json.loads(json.dumps(lost.as_message()))
            self.hosts[lost.at].does(MEMBER, "mend", told)
        step = found[0].step
        return step, self.does("bytes_at", [step] * self.n)


@pytest.fixture
def net():
    with network(*MODULES) as found:
        yield found


def contents(rng, n):
    return [rng.bytes(int(rng.integers(0, 200_000))) for _ in range(n)]


def are_done(ends):
    return all(isinstance(end, dict) for end in ends)


def at_a_stage(group, process, stage, happens):
    """Lets something happen when a process has reached a stage; its node does not go on before.

    Returns an event that is set when it has happened.
    """
    has_happened, host = threading.Event(), group.hosts[process]

    def reached(number, reached_stage):
        if (number, reached_stage) == (host.number, stage) and not has_happened.is_set():
            happens()
            has_happened.set()

    group.net.reached = reached
    return has_happened


def lose_one(group, rng, step, stage):
    """Takes one machine away at a stage of an exchange. Returns whether the newest step is back."""
    lost, n = int(rng.integers(group.n)), group.n
    wanted = {step: group.does("write", [step] * n, contents(rng, n))}
    assert are_done(group.exchange(step))
    wanted[step + 1] = group.does("write", [step + 1] * n, contents(rng, n))
    if stage == "rest":
        assert are_done(group.exchange(step + 1))
        group.hosts[lost].die()
    else:
        who = lost if stage[1] == "own" else (lost + 1 + int(rng.integers(n - 1))) % n
        is_gone = at_a_stage(group, who, stage[0], group.hosts[lost].die)
        group.begin(step + 1)
        assert is_gone.wait(60)
    # The job may end, and its nodes with it. Or they have to find out that somebody is silent.
    if rng.integers(2):
        group.restart_nodes(but=lost)
    group.does("ended", but=lost)
    group.replace(lost)
    found, contents_now = group.whole()
    assert contents_now == wanted[found]
    assert found == step + 1 or stage != "rest"
    assert are_done(group.exchange(found))
    return found == step + 1


@pytest.mark.parametrize(
    ("n", "kills"),
    [
        (3, range(2)),
        *(
            pytest.param(n, range(first, first + 20), marks=pytest.mark.slow)
            for n in (3, 4, 8)
            for first in range(0, 100, 20)  # None of these tests takes minutes.
        ),
    ],
)
def test_whoever_is_lost_with_its_memory_comes_back_bit_for_bit(net, n, kills, tell):
    rng = np.random.default_rng((n, kills.start))
    group = Group(net, n)
    stages = [STAGES[i % len(STAGES)] for i in kills]
    newest = [lose_one(group, rng, 2 * i, stage) for i, stage in enumerate(stages)]
    tell(
        f"machines lost in a group of {n}",
        f"{len(kills)}, {stages.count('rest')} of them at rest",
        f"{sum(newest)} times the newest",
        f"{len(kills) - sum(newest)} times the one before",
    )


@pytest.mark.parametrize(
    ("stage", "is_seen"),
    [
        ("stripe", True),
        *(
            pytest.param(stage, is_seen, marks=pytest.mark.slow)
            for stage, is_seen in (("asked", False), ("asked", True), ("stripe", False))
        ),
    ],
)
def test_a_link_that_is_cut_fails_one_exchange_in_time_and_the_next_one_protects(
    net, stage, is_seen
):
    """The machine is there, and everything to it and from it is lost, after they have connected."""
    rng = np.random.default_rng(5)
    group = Group(net, 3)
    group.does("write", [10] * 3, contents(rng, 3))
    assert are_done(group.exchange(10))
    group.does("write", [11] * 3, contents(rng, 3))
    cut = group.hosts[0]
    is_cut = at_a_stage(group, 1, stage, lambda: cut.cut(is_seen=is_seen))
    ends = group.exchange(11)
    assert is_cut.is_set(), ends
    # Its time was not over: the kernel of the other machine was silent.
    silent = [end for end in ends if isinstance(end, str)]
    assert silent
    assert all("does not answer as a member: [Errno" in end for end in silent)
    cut.heal()
    assert group.whole()[0] == 11  # Nobody was lost.
    newer = group.does("write", [12] * 3, contents(rng, 3))
    assert are_done(group.exchange(12))
    group.hosts[2].die()
    group.replace(2)
    assert group.whole() == (12, newer)


def protects_again(group, rng, step):
    """Whether the newest step comes back from parity, when all machines are there again."""
    newer = group.does("write", [step] * group.n, contents(rng, group.n))
    assert are_done(group.exchange(step))
    group.hosts[2].die()
    group.replace(2)
    return group.whole() == (step, newer)


def test_a_machine_that_hangs_fails_one_exchange_in_time_and_protects_when_it_goes_on(net):
    """Its kernel answers that all has come; only the others' clocks tell that nothing goes on."""
    rng = np.random.default_rng(6)
    group = Group(net, 3)
    older = group.does("write", [10] * 3, contents(rng, 3))
    assert are_done(group.exchange(10))
    newer = group.does("write", [11] * 3, contents(rng, 3))
    hung, other = group.hosts[:2]
    has_hung = threading.Event()

    def reached(number, stage):
        if number == other.number and stage == "asked" and not has_hung.is_set():
            hung.freeze()
            has_hung.set()
        # Of 60 seconds: so long does it wait for the others.
        return 57.0 if stage == "asked" else None

    group.net.reached = reached
    group.begin(11)
    assert has_hung.wait(60)
    ends = group.does("ended", but=0)
    assert "does not answer as a member" in ends[1]
    group.net.reached = lambda *_: None
    hung.thaw()
    group.hosts[0].does(MEMBER, "ended")
    assert group.whole() == (11, newer)  # Nobody was lost.
    assert group.does("bytes_at", [10] * 3) == older
    assert protects_again(group, rng, 12)


@pytest.mark.slow
def test_a_machine_that_hangs_at_rest_or_while_it_is_needed_is_given_up_in_time(net):
    rng = np.random.default_rng(7)
    group = Group(net, 3, timeout_s=20.0)
    group.hosts[0].freeze()
    group.does("write", [9] * 3, contents(rng, 3), but=0)
    members = list(enumerate(group.addresses))
    group.does("begin", [9] * 3, [members] * 3, but=0)
    assert all("does not answer" in end for end in group.does("ended", but=0)[1:])
    group.hosts[0].thaw()
    newer = group.does("write", [10] * 3, contents(rng, 3))
    assert are_done(group.exchange(10))
    group.hosts[2].die()
    group.replace(2)
    (plan, *_), _ = survey.plans(group.does("listing"), [ITEM], None)
    group.hosts[0].freeze()
    for lost in plan.lost:
        told = json.loads(json.dumps(lost.as_message()))
        with pytest.raises(KeeperError, match="does not answer"):
            group.hosts[lost.at].does(MEMBER, "mend", told)
    group.hosts[0].thaw()
    assert group.whole() == (10, newer)
    assert are_done(group.exchange(10))
    assert protects_again(group, rng, 11)


def test_a_machine_without_room_says_so_and_protects_when_it_has_room_again(net):
    rng = np.random.default_rng(9)
    group, full = Group(net, 3), re.compile(r"/dev/shm/\S+ has \d+ of \d+ bytes free")
    older = group.does("write", [10] * 3, contents(rng, 3))
    assert are_done(group.exchange(10))
    newer = group.does("write", [11] * 3, contents(rng, 3))
    first = group.hosts[0].process()  # The other one waits for the exchange.
    at_a_stage(group, 0, "asked", lambda: first.does(MEMORY, "leave", 2**16))
    ends = group.exchange(11)
    assert full.search(ends[0]), ends
    assert are_done(ends[1:])
    assert group.whole() == (11, newer)
    first.does(MEMORY, "leave", 2**26)
    # What has no parity on one of them does not come back; the one before does.
    group.hosts[2].die()
    group.replace(2)
    third = group.hosts[2]
    third.does(MEMORY, "leave", 2**16)
    with pytest.raises(KeeperError, match=full):
        group.whole()
    third.does(MEMORY, "leave", 2**26)
    assert group.whole() == (10, older)
    assert are_done(group.exchange(10))
    assert protects_again(group, rng, 12)


@pytest.mark.parametrize(
    "address",
    ["[fd00:88::{}]", pytest.param("fe80::88:{}%eth0", marks=pytest.mark.slow)],
)
def test_machines_of_ipv6_protect_each_other(net, address):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"there is no IPv6 here: {error}")
    group = Group(net, 3, address)
    assert group.addresses[0].startswith("[f")
    rng = np.random.default_rng(8)
    assert protects_again(group, rng, 10)
