"""Any one machine of a group may go with its memory; who is wrong is found out, and named."""

import pathlib
import threading
import time
import types

import numpy as np
import pytest
from equipment.nodes import ITEM, LIMIT_BYTES, RUN, key_of, machines

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.storage import pace
from lazy_orbax.storage.pace import Pace
from lazy_orbax.tiers.kept_listing import kept
from lazy_orbax.tiers.parity import files
from lazy_orbax.tiers.parity.errand import Errand, digest_in_chunks
from lazy_orbax.tiers.parity.survey import plans
from lazy_orbax.tiers.snapshot_file import PAGE_BYTES

FILLER = "0" * 32 + ".0.slabs"
RNG = np.random.default_rng(11)


def contents(n, size=50_000, uneven=0):
    return [RNG.bytes(size + i * uneven) for i in range(n)]


def whole(machines, step, wanted):
    return [machine.bytes_at(step) for machine in machines.all] == wanted


@pytest.mark.parametrize(
    ("n", "uneven"),
    [(2, 0), (3, 0), (3, 12_345), pytest.param(4, 777, marks=pytest.mark.slow),
     pytest.param(8, 1001, marks=pytest.mark.slow)],
)  # fmt: skip
def test_whoever_is_lost_at_rest_comes_back_bit_for_bit_and_is_protected_again(n, uneven):
    with machines(n) as job:
        wanted = job.write(10, contents(n, uneven=uneven))
        assert all("seconds" in done for done in job.exchange(10))
        for lost in range(n):
            job.lose(lost)
            (plan,), missing = job.plans()
            assert (plan.step, [one.process for one in plan.lost], missing) == (10, [lost], {})
            job.mend(plan)
            assert whole(job, 10, wanted)
            assert all("seconds" in done for done in job.exchange(10))


def test_each_sends_its_snapshot_once():
    with machines(3) as job:
        wanted = job.write(10, contents(3, size=3_000_000))
        done = job.exchange(10)
        sent = [machine.node.serving.sent_bytes for machine in job.all]
        assert sent == [len(content) for content in wanted]
        assert sum(one["received_bytes"] for one in done) == sum(sent)


def test_the_parity_of_the_snapshot_before_stays_while_new_parity_is_made():
    with machines(3) as job:
        older = job.write(10, contents(3))
        job.exchange(10)
        job.write(11, contents(3))
        job.all[2].node.serving.announced.tell(key_of(11), is_there=False)
        outcomes = job.each(
            lambda one: one.node.exchange(key_of(11), job.group) if one.process != 2 else None
        )
        assert all("will not be here" in str(error) for error in outcomes[:2])
        job.lose(1)
        (plan,), missing = job.plans()
        assert plan.step == 10
        assert "process 1" in missing[11]
        job.mend(plan)
        assert whole(job, 10, older)


@pytest.mark.parametrize("stage", ["asked", "stripe", "pulled", "sealed"])
@pytest.mark.parametrize("lost", [0, 2])
def test_who_is_lost_at_a_stage_of_an_exchange_comes_back(stage, lost):
    """At worst with the snapshot before. The others come to an end, too."""
    with machines(3) as job:
        wanted = {step: job.write(step, contents(3)) for step in (10,)}
        job.exchange(10)
        wanted[11] = job.write(11, contents(3))

        def dies(reached):
            if reached == stage:
                job.all[lost].node.close()
                raise KeeperError("it is gone")

        job.all[lost].node.reached = dies
        job.exchange(11)
        job.lose(lost)
        found, _ = job.plans()
        assert found[-1].step == 10
        job.mend(found[0])
        assert whole(job, found[0].step, wanted[found[0].step])


def test_two_of_one_group_are_too_many_and_it_says_what_is_missing():
    with machines(3) as job:
        job.write(10, contents(3))
        job.exchange(10)
        job.lose(0)
        job.lose(2)
        found, missing = job.plans()
        assert found == []
        assert "the snapshot of process 2" in missing[10]
        assert "the parity of process 2" in missing[10]


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("what", ["snapshot", "parity"])
def test_a_flipped_bit_is_found_and_said_of_whom(what):
    with machines(3) as job:
        job.write(10, contents(3))
        job.exchange(10)
        job.lose(0)
        find = files.snapshot_of if what == "snapshot" else files.parity_of
        flip(find(job.all[1].shelf, RUN, 1, key_of(10)).path, PAGE_BYTES + 7)
        (plan,), _ = job.plans()
        name = "stripe" if what == "snapshot" else "parity"
        with pytest.raises(KeeperError, match=f"{name} of process 1"):
            job.mend(plan)
        # Nothing of it is left.
        assert job.all[0].shelf.files() == []


def test_one_who_lies_in_parity_and_its_digest_makes_no_snapshot():
    with machines(3) as job:
        job.write(10, contents(3))
        job.exchange(10)
        job.lose(0)
        parity = files.parity_of(job.all[1].shelf, RUN, 1, key_of(10))
        flip(parity.path, PAGE_BYTES + 9)
        told = pathlib.Path(parity.path).read_bytes()[PAGE_BYTES:][: parity.facts["parity_bytes"]]
        listing = job.all[1].listing()
        listing["parities"][0]["parity_digest"] = digest_in_chunks(np.frombuffer(told, np.uint8))
        job.all[1].listing = lambda: listing
        (plan,), _ = job.plans()
        with pytest.raises(KeeperError, match="put together"):
            job.mend(plan)


def test_a_snapshot_that_moved_with_its_machine_is_copied():
    """The job restarts with its processes on other hosts."""
    with machines(3) as job:
        wanted = job.write(10, contents(3))
        first, second = job.all[0], job.all[1]
        listings = [second.listing(), first.listing(), job.all[2].listing()]
        (plan,), _ = plans(listings, [ITEM], None)
        assert [(one.process, one.copy) for one in plan.lost] == [
            (0, first.node.address), (1, second.node.address),
        ]  # fmt: skip
        second.node.make_whole(plan.lost[0])
        moved = files.snapshot_of(second.shelf, RUN, 0, key_of(10))
        assert pathlib.Path(moved.path).read_bytes()[: moved.n_bytes] == wanted[0]


def test_what_is_overwritten_while_it_is_sent_is_not_taken():
    with machines(2) as job:
        job.write(10, contents(2))
        told = {"what": "snapshot", "process": 1, "item": ITEM, "step": 10, "life": 7}
        serving = job.all[1].node.serving
        digest, chunk = serving.read(told, 0, 1000)
        assert (digest, len(chunk)) == (digest_of_bytes(chunk), 1000)
        job.all[1].write(12, b"another")
        with pytest.raises(KeeperError, match="no snapshot"):
            serving.read(told, 1000, 2000)


@pytest.mark.parametrize("at", [(0, 10**9), (-5, 5), (60_000, 70_000)])
def test_nobody_gets_what_is_not_there(at):
    with machines(2) as job:
        job.write(10, contents(2))
        told = {"what": "snapshot", "process": 1, "item": ITEM, "step": 10, "life": 7}
        with Errand(job.all[0].settings) as errand:
            peer = errand._peer(job.all[1].node.address)
            with pytest.raises(KeeperError, match="wanted"):
                more = {**told, "first": at[0], "end": at[1]}
                list(peer._answer("/read", more, memoryview(b""), [0], time.monotonic() + 30))


def test_without_room_nothing_changes():
    with machines(2) as job:
        job.write(10, contents(2))
        job.exchange(10)
        before = job.all[0].shelf.files()
        job.write(11, contents(2, size=2_000_000))
        used = job.all[0].shelf.used_bytes()
        job.all[0].shelf.make_room(FILLER, LIMIT_BYTES - used - 2**20, LIMIT_BYTES)
        error, other = job.exchange(11)
        assert "limit" in str(error)
        assert "seconds" in other
        assert set(before) <= set(job.all[0].shelf.files())
        job.all[0].shelf.remove(FILLER)
        assert all("seconds" in done for done in job.exchange(11))


def test_exchanges_are_limited_in_speed_and_rebuilding_is_not(monkeypatch):
    turns = []
    monkeypatch.setattr(Pace, "await_turn", lambda self, n_bytes, ended: turns.append(n_bytes))
    with machines(2) as job:
        wanted = job.write(10, contents(2))
        job.exchange(10)
        assert sum(turns) == sum(map(len, wanted))
        job.lose(1)
        (plan,), _ = job.plans()
        job.mend(plan)
        assert sum(turns) == sum(map(len, wanted))


@pytest.mark.parametrize("limit", [2**20, 50 * 10**6, 2**29])
def test_a_snapshot_takes_as_long_as_the_limit_says(monkeypatch, limit):
    """On a clock that only waiting moves on."""

    class Clock(threading.Event):
        now_s = 5.0

        def wait(self, timeout=None):
            self.now_s += timeout
            return False

    clock = Clock()
    now = types.SimpleNamespace(monotonic=lambda: clock.now_s)
    with machines(2, bytes_per_s=limit) as job:
        (content, _) = job.write(10, contents(2, size=3_000_000))
        monkeypatch.setattr(pace, "time", now)
        serving = job.all[0].node.serving
        serving._over = clock
        told = {"what": "exchange", "process": 0, "item": ITEM, "step": 10, "life": 7}
        told |= {"n": 2, "owner": 0, "holder": 1}
        for first in range(0, len(content), 10**5):
            serving.read(told, first, min(first + 10**5, len(content)))
        assert clock.now_s - 5.0 == pytest.approx(len(content) / limit)
        serving._over = threading.Event()


def test_parity_is_listed_beside_the_snapshots():
    with machines(2) as job:
        job.write(10, contents(2))
        job.exchange(10)
        found = kept(job.all[0].shelf.path).snapshots
        assert [(one.item, one.step, one.problem) for one in found] == [
            (ITEM, 10, None), (f"{ITEM} (parity)", 10, None),
        ]  # fmt: skip
        assert found[1].age_s < 3600
