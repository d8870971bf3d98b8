"""Jobs on machines that are lost, cut off and replaced. Each has its own memory and addresses."""

import concurrent.futures
import threading

import pytest
from equipment.hosts import network
from equipment.trainer import VARIABLES

TRAINER = "equipment.trainer.Trainer"
MEMORY = "equipment.hosts_zygote.Memory"
PORT = 4000


class Job:
    """Processes that train together, one on each machine."""

    def __init__(self, hosts, run):
        self.hosts, n = hosts, len(hosts)
        self._pool = concurrent.futures.ThreadPoolExecutor(n)
        self._trainers = self._each(lambda host: host.process(), hosts)
        address = f"{hosts[0].address}:{PORT}"
        told = [(address, n, i, str(run), host.other_address) for i, host in enumerate(hosts)]
        self.groups = self._each(lambda trainer, one: trainer.does(TRAINER, "join", *one),
                                 self._trainers, told)  # fmt: skip

    def _each(self, work, *parts):
        return list(self._pool.map(work, *parts))

    def does(self, method, *arguments):
        """Has all processes do something at once."""
        return self._each(lambda one: one.does(TRAINER, method, *arguments), self._trainers)

    def keep(self, step):
        """Keeps a step, and returns what became of its parity."""
        assert self.does("keep", step) == [True] * len(self.hosts)
        return self.does("protection")

    def end(self, but=()):
        """Ends the processes, as a scheduler does when one of them is lost."""
        for host, trainer in zip(self.hosts, self._trainers, strict=True):
            if host not in but:
                host.kill(trainer)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def net():
    with network("equipment.trainer", **VARIABLES) as found:
        yield found


@pytest.mark.slow
def test_two_machines_are_too_many_and_storage_is_next(net, tmp_path):
    hosts = [net.host() for _ in range(3)]
    job = Job(hosts, tmp_path / "run")
    job.does("store", 5)
    assert [one["newest_step"] for one in job.keep(7)] == [7] * 3
    for host in hosts[1:]:
        host.die()
    job.end(but=hosts[1:])
    job = Job([hosts[0], net.host(), net.host()], tmp_path / "run")
    for found in job.does("restore"):
        assert (found["step"], found["tier"], found["rebuilt"]) == (5, "storage", [])
        assert "the snapshot of process 1 is nowhere" in found["why"]
    job.end()


@pytest.mark.slow
def test_where_there_is_no_room_to_make_it_again_storage_is_next_and_training_goes_on(
    net, tmp_path
):
    hosts = [net.host() for _ in range(3)]
    job = Job(hosts, tmp_path / "run")
    job.does("store", 5)
    assert [one["newest_step"] for one in job.keep(7)] == [7] * 3
    hosts[2].die()
    job.end(but=[hosts[2]])
    small = net.host()
    job = Job([*hosts[:2], small], tmp_path / "run")
    small.does(MEMORY, "leave", 2**15)
    found = job.does("restore")
    assert [(one["step"], one["tier"], one["rebuilt"]) for one in found] == [(5, "storage", [])] * 3
    assert "bytes free" in found[2]["why"]
    assert [one["newest_step"] for one in job.keep(8)] == [None] * 3
    assert "bytes free" in job.does("said")[2]
    job.does("train", 9)
    small.does(MEMORY, "leave", 2**26)
    assert [one["newest_step"] for one in job.keep(10)] == [10] * 3
    job.end()


def test_a_job_goes_on_while_its_network_is_cut_and_after_it_on_other_machines(net, tmp_path):
    """A member is cut off in mid-exchange: half-open connections, and nobody says that.

    Then one is lost. What was process 0 is process 2 now, on the machine it was on.
    """
    hosts = [net.host() for _ in range(3)]
    job = Job(hosts, tmp_path / "run")
    assert job.groups == [[0, 1, 2]] * 3
    assert [one["newest_step"] for one in job.keep(7)] == [7] * 3
    is_cut, has_trained = threading.Event(), threading.Event()

    def reached(number, stage):
        if (number, stage) == (hosts[1].number, "asked") and not is_cut.is_set():
            hosts[0].cut(link=1)
            is_cut.set()
            assert has_trained.wait(60)

    net.reached = reached
    assert job.does("keep", 8) == [True] * 3
    assert is_cut.wait(60)
    job.does("train", 9)  # It takes no snapshot.
    has_trained.set()
    protection = job.does("protection")
    assert protection[1]["newest_step"] == 7
    assert "does not answer as a member: " in protection[1]["error"]
    assert "Step 8 has no parity" in job.does("said")[1]
    hosts[0].heal(link=1)
    assert [one["newest_step"] for one in job.keep(10)] == [10] * 3
    first, second, third = hosts
    third.die()
    job.end(but=[third])
    job = Job([second, net.host(), first], tmp_path / "run")
    for found in job.does("restore"):
        assert (found["step"], found["tier"], found["why"]) == (10, "memory", "")
        assert found["rebuilt"] == [(0, ()), (1, ()), (2, (0, 1))]
    assert [one["newest_step"] for one in job.does("protection")] == [10] * 3
    assert [one["newest_step"] for one in job.keep(11)] == [11] * 3
    job.end()


@pytest.mark.slow
def test_a_job_goes_on_with_fewer_machines_and_then_with_more(net, tmp_path):
    hosts = [net.host() for _ in range(3)]
    job = Job(hosts, tmp_path / "run")
    job.does("store", 5)
    assert [one["newest_step"] for one in job.keep(7)] == [7] * 3
    hosts[2].die()
    job.end(but=[hosts[2]])
    # Nobody took its place. These want what does not lie along the row of processes.
    job = Job(hosts[:2], tmp_path / "run")
    for found in job.does("restore", True):
        assert (found["step"], found["tier"]) == (5, "storage")
        assert "The memory of this machine does not have" in found["why"]
    job.end()
    # And these end before they have kept anything.
    job = Job(hosts[:2], tmp_path / "run")
    assert [one["step"] for one in job.does("restore")] == [7] * 2
    job.end()
    job = Job(hosts[:2], tmp_path / "run")
    for found in job.does("restore"):
        assert (found["step"], found["tier"], found["why"]) == (7, "memory", "")
    assert list(map(len, job.does("of_others"))) == [1, 1]
    # What the first machine has of process 1, and the second of process 2, goes when all have 9.
    for step in (8, 9, 10):
        assert [one["newest_step"] for one in job.keep(step)] == [step] * 2
    assert job.does("of_others") == [[], []]
    job.end()
    job = Job([*hosts[:2], net.host()], tmp_path / "run")
    for found in job.does("restore"):
        assert (found["step"], found["tier"], found["why"]) == (10, "memory", "")
        assert found["rebuilt"] == [(0, ()), (1, ())]
    assert [one["newest_step"] for one in job.keep(11)] == [11] * 3
    job.end()
