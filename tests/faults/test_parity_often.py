"""At night: kills at every stage of an exchange, again and again, and a thousand exchanges."""

import gc
import os
import threading

import numpy as np
import pytest
from equipment.nodes import machines

from lazy_orbax.errors import KeeperError

pytestmark = pytest.mark.slow
STAGES = ("asked", "stripe", "pulled", "sealed", None)


def contents(rng, n):
    return [rng.bytes(int(rng.integers(0, 200_000))) for _ in range(n)]


@pytest.mark.parametrize("n", [3, 4, 8])
def test_a_hundred_kills_cost_at_worst_the_newest_snapshot(n):
    rng, newest = np.random.default_rng(n), 0
    with machines(n) as job:
        for kill in range(100):
            lost, stage = int(rng.integers(n)), STAGES[kill % len(STAGES)]
            older, newer = 2 * kill, 2 * kill + 1
            wanted = {older: job.write(older, contents(rng, n))}
            assert all("seconds" in done for done in job.exchange(older))
            wanted[newer] = job.write(newer, contents(rng, n))

            def dies(reached, node=job.all[lost].node, stage=stage):
                if reached == stage:
                    node.close()
                    raise KeeperError("it is gone")

            job.all[lost].node.reached = dies
            done = job.exchange(newer)
            job.lose(lost)
            found, _ = job.plans()
            plan = found[0]
            assert plan.step in wanted
            if stage is None:
                assert all("seconds" in one for one in done)
                assert plan.step == newer
            newest += plan.step == newer
            job.mend(plan)
            assert [one.bytes_at(plan.step) for one in job.all] == wanted[plan.step]
    assert 20 <= newest < 100


def used():
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident


def test_a_thousand_exchanges_leave_nothing_behind():
    rng = np.random.default_rng(5)
    with machines(3) as job:
        after = []
        for step in range(1000):
            job.write(step, [rng.bytes(100_000 + i) for i in range(3)])
            assert all("seconds" in done for done in job.exchange(step))
            if step in (199, 999):
                after.append(used())
        (files, threads, resident), (files_then, threads_then, resident_then) = after
        assert files_then <= files + 4
        assert threads_then <= threads + 4
        assert resident_then <= resident + 8 * 2**20
        assert all(len(one.shelf.files()) == 4 for one in job.all)
