"""The power of a tier's disk is cut while a step is brought there: what is listed then is whole.

By one program, and by two machines together; see `test_power_cuts.py`. By day a few points around
the moment in which the step is listed are tried, at night every call.
"""

from __future__ import annotations

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
from lazy_orbax.handlers.promoting import promote

RUN = "/run"
ITEM = "/2.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp"
NO_HEURISTIC = "ext4 noauto_da_alloc"
AT_NIGHT = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ext4", "xfs")]


@pytest.fixture(params=[*AT_NIGHT, NO_HEURISTIC])
def disk(request, tmp_path):
    with crashes.disk_or_skip(tmp_path, request.param) as disk:
        yield disk


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Keepers' directories with step 2, of one machine and of two; a tier that has step 1."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    path, kept = tmp_path_factory.mktemp("promoted") / "tier", str(above / "k")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    with lazy_orbax.Keeper(RUN, directory=kept) as keeper:
        for step in (1, 2):
            keeper.save(step, make_state(step, mesh))
            keeper.wait()
            assert keeper.report.newest_step == step
            if step == 1:
                assert promote(RUN, tier_at(path), kept) == 1
        yield {1: [kept], 2: machines(above, kept, 2)}, path
    shutil.rmtree(above)


def tier_at(path):
    return lazy_orbax.Tier(str(path), every_s=1, keep=1)


class Cuts:
    """Cuts the power of a tier's disk while step 2 is brought there."""

    def __init__(self, zygote, disk, memory, work):
        self.zygote, self.disk, self.work = zygote, disk, work
        self.places, self.first = memory
        self.copy, self.gone = work / "copy", work / "gone"

    def cut(self, call="", nth=1, *, other=None):
        """Returns the calls that began, of the machine that leads."""
        root = self.disk.replace(self.first)
        death = {"call": call, "nth": nth, "cut": str(self.disk.mounted), "late": True}
        if other is None:
            calls = self.zygote.die(root, 2, death, memory=self.places[1][0])
        else:
            on = [
                {"memory": place, "machine": [i, 2], "gone": str(self.gone)}
                for i, place in enumerate(self.places[2])
            ]
            self.gone.unlink(missing_ok=True)
            follows = threading.Thread(target=other._do, args=(root, 2), kwargs=on[1])
            follows.start()
            try:
                calls = self.zygote.die(root, 2, death, **on[0])
            finally:
                self.gone.touch()
                follows.join()
        self.disk.after_the_cut(root, self.copy)
        return calls

    def check(self, calls, *, together):
        """The invariants, after the power is back."""
        listed = crashes.stock_lists(self.copy)
        assert listed
        assert crashes.stock_restores(self.copy, *listed) == {}
        if not crashes.published(calls, 2):
            assert listed == [1]
        if together:
            promoted(RUN, [tier_at(self.copy)] * 2, self.places[2])
        else:
            promote(RUN, tier_at(self.copy), self.places[1][0])
        assert crashes.stock_lists(self.copy) == [2]
        assert crashes.stock_restores(self.copy, 2) == {}
        assert lazy_orbax.verify(self.copy).is_whole


@pytest.fixture
def cuts(zygote, disk, memory, tmp_path):
    return Cuts(zygote, disk, memory, tmp_path)


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_power_is_cut_while_a_step_is_brought_down(cuts, tell, request, everywhere):
    tried(cuts, tell, request, everywhere=everywhere, other=None)


@pytest.mark.slow
def test_the_power_is_cut_while_machines_bring_a_step_down(cuts, other, tell, request):
    tried(cuts, tell, request, everywhere=True, other=other)


def tried(cuts, tell, request, *, everywhere, other):
    """Cuts the power at calls of a promotion, and when it is finished."""
    run = cuts.cut(other=other)
    assert run[-1] == "finished"
    together, failures = other is not None, []
    cuts.check(run, together=together)
    assert crashes.published(run, 2)
    listing = next(i for i, call in enumerate(run) if call.endswith(" /2"))
    synced = run.index("fsync ", listing)
    points = [listing, listing + 1, synced + 1]
    if everywhere:  # What machines write of their own is durable before they tell of it.
        joined = next(i for i, call in enumerate(run) if call.endswith(f"{ITEM}/manifest.ocdbt"))
        points = list(range(joined if together else 0, len(run) - 1))
    for position in points:
        call, nth = run[position], run[: position + 1].count(run[position])
        calls = cuts.cut(call, nth, other=other)
        try:
            cuts.check(calls, together=together)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"cut before {nth}. {call}: {error!r}")
    assert not failures, "\n".join(failures)
    tell(
        "Power cuts of a tier",
        request.node.callspec.params["disk"],
        "two machines" if together else "one",
        f"{len(run)} calls",
        f"{len(points)} cuts",
        "what is listed is whole",
    )
