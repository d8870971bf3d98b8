"""A trainer's part of parity: nodes that are programs, a store that all share, and a restore."""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import jax
import pytest
from equipment.nodes import ITEM, LIFE, LIMIT_BYTES, RUN, Machine, key_of, machines, written

import lazy_orbax
from lazy_orbax._orbax import multihost
from lazy_orbax.pods import consensus
from lazy_orbax.tiers.parity import files, guard, restoring
from lazy_orbax.tiers.parity.guarded_votes import GuardedVotes
from lazy_orbax.tiers.parity.node_link import NodeLink
from lazy_orbax.tiers.parity.settings import NodeSettings, Parity
from lazy_orbax.tiers.shelf import claim_of, file_of
from lazy_orbax.tiers.votes import Votes

N = 3


class Store:
    """JAX's key-value store, in this process."""

    def __init__(self):
        self.values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value, *, allow_overwrite):
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def key_value_delete(self, key):
        self.values.pop(key, None)

    def blocking_key_value_get(self, key, timeout_s):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_s):
                raise TimeoutError(key)
            return self.values[key]


class Processes:
    """Threads that take themselves for the processes of a job."""

    def __init__(self, monkeypatch):
        self.mine, self.barrier = threading.local(), threading.Barrier(N, timeout=60)
        self.store, self._flags = Store(), [False] * N
        monkeypatch.setattr(jax, "process_count", lambda *_: N)
        monkeypatch.setattr(jax, "process_index", lambda *_: getattr(self.mine, "process", 0))
        monkeypatch.setattr(multihost, "key_value_store", lambda: self.store)
        monkeypatch.setattr(consensus, "which_processes", self._which)
        monkeypatch.setattr(consensus, "any_process", lambda flags: self._which(flags[0]))

    def _which(self, flag):
        self._flags[self.mine.process] = flag
        self.barrier.wait()
        found = [i for i, one in enumerate(self._flags) if one]
        self.barrier.wait()
        return found

    def each(self, work):
        outcomes = [None] * N

        def run(process):
            self.mine.process = process
            try:
                outcomes[process] = work(process)
            except Exception as error:  # noqa: BLE001 - It is what the test looks at.
                outcomes[process] = error

        threads = [threading.Thread(target=run, args=(i,)) for i in range(N)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return outcomes


@pytest.fixture
def job(tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:
        yield Job(stack, Processes(monkeypatch))


class Job:
    """Machines whose nodes are programs of their own."""

    def __init__(self, stack, processes, domains="abc", **options):
        self.processes, self._stack = processes, stack
        above = tempfile.mkdtemp(prefix="lo-", dir="/dev/shm")
        stack.callback(shutil.rmtree, above, ignore_errors=True)
        self.machines = [Machine(f"{above}/{i}", i, N) for i in range(N)]
        for machine in self.machines:
            stack.callback(machine.close)
        self.guards = processes.each(lambda i: self._guard(i, domains[i], options))
        processes.each(lambda i: self.guards[i].join())

    def _guard(self, process, domain, options):
        parity = Parity(group=N, domain=domain, host="127.0.0.1", timeout_s=30.0, **options)
        made = guard.Guard(parity, self.machines[process].shelf, RUN)
        self._stack.callback(made.close)
        return made

    def write(self, step):
        for machine in self.machines:
            machine.write(step, os.urandom(10_000 + machine.process))
        return [machine.bytes_at(step) for machine in self.machines]


def test_exchange_loss_rebuild_and_protection_again(job):
    wanted = job.write(10)
    assert job.processes.each(lambda i: job.guards[i].exchange(key_of(10))) == [True] * N
    reports = [one.report for one in job.guards]
    assert [one.group for one in reports] == [(0, 1, 2)] * N
    assert [(one.protected, one.newest_step, one.error) for one in reports] == [(1, 10, None)] * N
    assert sum(one.received_bytes for one in reports) == sum(map(len, wanted))
    for file in job.machines[1].shelf.files():
        job.machines[1].shelf.remove(file)
    made = job.processes.each(lambda i: restoring.make_whole(job.guards[i], [ITEM], None))
    assert made == [made[0]] * N
    (rebuilt,) = made[0].rebuilt
    assert (rebuilt.process, rebuilt.step, rebuilt.sources) == (1, 10, (0, 2))
    assert [machine.bytes_at(10) for machine in job.machines] == wanted
    job.processes.each(lambda i: restoring.protect_again(job.guards[i], [ITEM], 10, LIFE))
    job.processes.each(lambda i: job.guards[i].wait(60))
    assert [one.report.protected for one in job.guards] == [2] * N
    assert files.parity_of(job.machines[1].shelf, RUN, 1, key_of(10))


def test_a_liar_fails_the_step_on_all_and_the_one_before_is_made(job):
    older = job.write(10)
    job.processes.each(lambda i: job.guards[i].exchange(key_of(10)))
    job.write(11)
    job.processes.each(lambda i: job.guards[i].exchange(key_of(11)))
    for file in job.machines[0].shelf.files():
        job.machines[0].shelf.remove(file)
    parity = files.parity_of(job.machines[2].shelf, RUN, 2, key_of(11))
    with open(parity.path, "r+b") as file:
        file.seek(files.PARITY_BEGINS + 5)
        file.write(b"lies")
    made = job.processes.each(lambda i: restoring.make_whole(job.guards[i], [ITEM], None))
    assert [[one.step for one in each.rebuilt] for each in made] == [[10]] * N
    assert "parity of process 2" in dict(made[0].missing)[11]
    assert "process 0 could not" in dict(made[1].missing)[11]
    assert [machine.bytes_at(10) for machine in job.machines] == older


CLAIM = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()"""


@pytest.fixture
def claimed():
    """Has another process write what a process saves, on a shelf, until the end of the test."""
    with contextlib.ExitStack() as stack:

        def claim(shelf, process):
            command = [sys.executable, "-c", CLAIM, f"{shelf.path}/{claim_of(RUN, process)}"]
            pipe = subprocess.PIPE
            other = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe))
            stack.callback(other.stdin.close)
            assert other.stdout.read(1)

        yield claim


def test_what_moved_away_is_removed_when_all_have_a_newer_step(job, claimed, monkeypatch):
    """Process 2 is on another machine now; process 0 came to this one, beside process 1."""
    shelf = job.machines[1].shelf
    make_room = functools.partial(shelf.make_room, limit_bytes=LIMIT_BYTES)
    for process in range(N):
        written(shelf, make_room, (process, N), 10, b"of an earlier life")
    claimed(shelf, 0)
    monkeypatch.setattr(Votes, "is_common", lambda *_, timeout_s: step == 12)
    votes = job.processes.each(lambda i: GuardedVotes(job.guards[i], ITEM, LIFE + 1))[1]
    for step, left in ((11, [0, 1, 2]), (12, [0, 1])):
        assert votes.is_common(step, timeout_s=60) is (step == 12)
        assert shelf.files() == sorted(file_of(RUN, ITEM, process, 0) for process in left)


def test_what_is_of_another_number_of_processes_is_not_protected_again(job):
    job.write(10)
    for process, machine in enumerate(job.machines):
        make_room = functools.partial(machine.shelf.make_room, limit_bytes=LIMIT_BYTES)
        written(machine.shelf, make_room, (process, N + 1), 11, b"of one more")
    for step, again in ((10, 1), (11, 1)):
        job.processes.each(
            lambda i, step=step: restoring.protect_again(job.guards[i], [ITEM], step, LIFE)
        )
        job.processes.each(lambda i: job.guards[i].wait(60))
        assert [one.report.protected for one in job.guards] == [again] * N
    assert [one.report.failed for one in job.guards] == [0] * N


def test_a_node_that_was_killed_is_replaced_and_the_others_find_it(job):
    job.write(10)
    link = job.guards[1].link()
    os.kill(link._program.pid, signal.SIGKILL)
    link._reading.result(60)
    assert link.is_gone
    job.processes.each(lambda i: job.guards[i].link())
    assert job.processes.each(lambda i: job.guards[i].exchange(key_of(10))) == [True] * N


def test_votes_wait_for_parity_and_not_for_ever(job):
    votes = job.processes.each(lambda i: GuardedVotes(job.guards[i], ITEM, LIFE))

    def tell(step, who):
        job.processes.each(lambda i: votes[i].tell(step, is_sealed=i in who))
        return job.processes.each(lambda i: votes[i].is_common(step, timeout_s=60))

    job.write(10)
    assert tell(10, {0, 1, 2}) == [True] * N
    # Process 2 has lost each of these steps: nobody has parity, and the one before is to stay.
    for step in (11, 12):
        job.write(step)
        assert tell(step, {0, 1})[0] is False
        assert job.processes.store.values[f"lazy_orbax/kept/{LIFE}/{ITEM}/{step}/0"] == "lost"
    assert not job.guards[0].is_in_vain
    job.write(13)
    tell(13, {0, 1})
    assert job.guards[0].is_in_vain
    assert job.processes.store.values[f"lazy_orbax/kept/{LIFE}/{ITEM}/13/0"] == "sealed"
    assert "will not be here" in job.guards[0].report.error


def test_on_one_host_training_goes_on_without(monkeypatch, caplog):
    with contextlib.ExitStack() as stack:
        job = Job(stack, Processes(monkeypatch), domains="aaa")
        job.write(10)
        assert job.processes.each(lambda i: job.guards[i].exchange(key_of(10))) == [True] * N
        assert all("failure domain" in one.report.error for one in job.guards)
        assert [one.report.protected for one in job.guards] == [0] * N
    assert "have no parity" in caplog.text


def test_one_process_has_nobody_to_keep_parity_for_it(tmp_path, served, caplog):
    with lazy_orbax.Keeper(tmp_path, directory=served, parity=Parity()) as keeper:
        keeper.save(1, {"a": 1.0})
        keeper.wait()
        assert keeper.report.newest_step == 1
        assert "one process" in keeper.protection.error
    assert "have no parity" in caplog.text


def test_the_only_process_that_is_left_makes_again_what_the_other_had():
    """Nobody takes the place of the machine that is lost."""
    with machines(2) as job:
        wanted = job.write(10, [os.urandom(10_000), os.urandom(20_000)])
        assert all("seconds" in done for done in job.exchange(10))
        left, lost = job.all
        for file in lost.shelf.files():
            lost.shelf.remove(file)
        alone = guard.Guard(Parity(), left.shelf, RUN)
        made = restoring.make_whole(alone, [ITEM], None)
        alone.close()
        assert [(one.process, one.sources) for one in made.rebuilt] == [(1, (0,))]
        found = files.snapshot_of(left.shelf, RUN, 1, key_of(10))
        assert pathlib.Path(found.path).read_bytes()[: found.n_bytes] == wanted[1]


def test_a_child_that_holds_the_pipe_does_not_keep_a_node(place):
    """Such as a worker that loads data: it was forked when the pipe was open."""
    link = NodeLink(NodeSettings(place, RUN, 0, "0123456789abcdef"))
    held = os.dup(link._program.stdin.fileno())
    link.close()
    assert link._program.returncode == -signal.SIGTERM
    os.close(held)
