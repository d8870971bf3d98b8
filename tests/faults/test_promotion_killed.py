"""A promotion killed before every call that changes its tier, and what must hold.

The tier keeps one step, so that the removal of the old one is among the points. What is listed is
whole, one step is always listed, and the next promotion completes what was begun.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from faults import crashes
from faults.crash_state import make_state

import lazy_orbax
from lazy_orbax._paths import PROMOTED
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.inspect import clean

# By day the first call of each kind on one of these, at night all calls.
SOME = {
    "/2.orbax-checkpoint-tmp",
    f"/2.orbax-checkpoint-tmp/{PROMOTED}",
    "/2.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp/manifest.ocdbt",
    "/2",
    "/1.orbax-checkpoint-tmp-going",
    "/1.orbax-checkpoint-tmp-going/_CHECKPOINT_METADATA",
}


@pytest.fixture(scope="module")
def memory(zygote, tmp_path_factory):
    """A keeper's directory with step 2, and a tier to which step 1 was brought before."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    tier = tmp_path_factory.mktemp("promoted") / "tier"
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    with lazy_orbax.Keeper("/run", directory=str(above / "k")) as keeper:
        for step in (1, 2):
            keeper.save(step, make_state(step, mesh))
            keeper.wait()
            assert keeper.report.newest_step == step
            if step == 1:
                zygote.save(tier, 2, memory=str(above / "k"))
        yield str(above / "k"), tier
    shutil.rmtree(above)


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_promotion_killed_at_every_call(zygote, memory, tmp_path, tell, everywhere):
    directory, first = memory
    tier, failures, n_kills = tmp_path / "tier", [], 0

    def kill(call="", nth=1):
        shutil.rmtree(tier, ignore_errors=True)
        shutil.copytree(first, tier)
        calls = zygote.die(tier, 2, {"call": call, "nth": nth}, memory=directory)
        try:
            check(tier, calls, directory)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"killed before {nth}. {call or 'nothing'}: {error!r}")
        return calls[:-1]

    runs = [kill() for _ in range(3 if everywhere else 1)]
    if not everywhere:
        runs = [[call for call in dict.fromkeys(runs[0]) if call.split(" ", 1)[1] in SOME]]
        assert {call.split(" ", 1)[1] for call in runs[0]} == SOME
    points = {call: max(run.count(call) for run in runs) for run in runs for call in run}
    for call, n_calls in points.items():
        for nth in range(1, n_calls + 1):
            kill(call, nth)
            n_kills += 1
    assert not failures, "\n".join(failures)
    tell(
        "Promotions killed at every call that changes the tier",
        "everywhere" if everywhere else "some of them",
        f"{max(map(len, runs))} calls",
        f"{n_kills} kills",
    )


def check(tier, calls, directory):
    """The invariants, after `calls` began of which the last was not made."""
    listed = crashes.stock_lists(tier)
    assert (2 in listed) == crashes.published(calls, 2)
    assert (1 in listed) == ("rename /1.orbax-checkpoint-tmp-going" not in calls[:-1])
    assert crashes.stock_restores(tier, *listed) == {}
    promote("/run", lazy_orbax.Tier(str(tier), every_s=1, keep=1), directory)
    assert crashes.stock_lists(tier) == [2]
    assert crashes.stock_restores(tier, 2) == {}
    assert lazy_orbax.verify(tier).is_whole
    assert os.listdir(tier) == ["2"]
    assert clean(tier).directories == ()
