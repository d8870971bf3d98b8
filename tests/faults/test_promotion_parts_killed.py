"""One of two machines that bring a step to a tier dies before every call that changes the tier.

The other one goes on, or gives up. What is listed is whole, a step is always listed, and the next
promotion completes what was begun.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
import threading

import jax
import numpy as np
import pytest
from equipment.machines import machines, promoted
from faults import crashes
from faults.crash_state import make_state

import lazy_orbax
from lazy_orbax.inspect import clean
from lazy_orbax.tiers import meeting

RUN = "/run"
_ITEM = "/2.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp"
_MEETING = "/lazy_orbax_meeting/" + "70" * 8
# By day the rename to one of these, at night all calls, in shares that take a minute each.
_SHARES = 12
AT_NIGHT = [pytest.param(share, marks=pytest.mark.slow) for share in range(_SHARES)]
SOME = (
    {f"{_ITEM}/manifest.ocdbt", "/2"},
    {f"{_MEETING}/done0-1"},
)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Keepers' directories of two machines with step 2, and a tier to which they brought step 1."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    path = tmp_path_factory.mktemp("promoted") / "tier"
    tier = lazy_orbax.Tier(path, every_s=1, keep=1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    with lazy_orbax.Keeper(RUN, directory=str(above / "k")) as keeper:
        for step in (1, 2):
            keeper.save(step, make_state(step, mesh))
            keeper.wait()
            assert keeper.report.newest_step == step
            places = machines(above, str(above / "k"), 2)
            if step == 1:
                assert promoted(RUN, [tier] * 2, places) == [1, 1]
    yield places, path
    shutil.rmtree(above)


@pytest.mark.parametrize("share", [None, *AT_NIGHT])
@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "follower"])
def test_a_machine_killed_at_every_call(  # noqa: PLR0913
    zygote, other, memory, tmp_path, tell, victim, share, monkeypatch
):
    monkeypatch.setattr(meeting, "_LOOK_S", 0.01)
    places, first = memory
    tier, gone, failures, n_kills = tmp_path / "tier", tmp_path / "gone", [], 0

    def on(machine):
        return {"memory": places[machine], "machine": [machine, 2], "gone": str(gone)}

    def kill(call="", nth=1):
        shutil.rmtree(tier, ignore_errors=True)
        shutil.copytree(first, tier)
        gone.unlink(missing_ok=True)
        survives = threading.Thread(target=other._do, args=(tier, 2), kwargs=on(1 - victim))
        survives.start()
        try:
            calls = zygote.die(tier, 2, {"call": call, "nth": nth}, **on(victim))
        finally:
            gone.touch()
            survives.join()
        try:
            check(tier, calls, victim, places)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"killed before {nth}. {call or 'nothing'}: {error!r}")
        return calls[:-1]

    run = kill()
    points = [(call, run[: i + 1].count(call)) for i, call in enumerate(run)]
    if share is None:
        points = [(f"rename {path}", 1) for path in SOME[victim]]
        assert {call for call, _ in points} <= set(run)
    for call, nth in points if share is None else sorted(points)[share::_SHARES]:
        kill(call, nth)
        n_kills += 1
    assert not failures, "\n".join(failures)
    tell(
        "Machines killed while they bring a step to a tier together",
        ("leader", "follower")[victim],
        "a few calls" if share is None else f"one in {_SHARES} from {share}",
        f"{len(run)} calls",
        f"{n_kills} kills",
    )


def check(path, calls, victim, places):
    """The invariants, after `calls` of the victim began of which the last was not made."""
    listed = crashes.stock_lists(path)
    if victim == 0:
        assert (2 in listed) == crashes.published(calls, 2)
    else:
        is_done = any(call.endswith(f"{_MEETING}/done0-1") for call in calls[:-1])
        assert is_done or 2 not in listed
    assert listed
    assert crashes.stock_restores(path, *listed) == {}
    tier = lazy_orbax.Tier(str(path), every_s=1, keep=1)
    assert promoted(RUN, [tier] * 2, places) == ([None, None] if 2 in listed else [2, 2])
    assert crashes.stock_lists(path) == [2]
    assert crashes.stock_restores(path, 2) == {}
    assert lazy_orbax.verify(path).is_whole
    assert os.listdir(path) == ["2"]
    assert clean(path).directories == ()
