"""The power is cut at calls of a save, on file systems of their own; then they are mounted again.

The file system's own shutdown drops what is not on stable storage, as a power cut does, at a call
that the interposer of the crash matrix picks. `late` is what hurts most: somebody else has just
synced a file, so that the journal is committed with the names of our files, but without what was
not synced of them. Every point is tried from the merge until the step is durable, and a few more.
LAZY_ORBAX_EVERY_POINT=1 tries all of the save, late and not.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.pods import states
from equipment.pods.jobs import reports, run_job
from faults import crashes
from faults.test_crash_matrix import MERGED, is_removal

EVERY_POINT = os.environ.get("LAZY_ORBAX_EVERY_POINT") == "1"
TABLE = "Power cuts"


# Where nobody syncs, as in stock Orbax, the kernel may still write everything back in time: it does
# so when others on the machine write much. Then the cut takes nothing, and is made once more.
_CUTS_OF_STOCK = 5
# Without what ext4 does for programs that write a file anew in place and do not sync it.
NO_HEURISTIC = "ext4 noauto_da_alloc"


@pytest.fixture(params=["ext4", "xfs", NO_HEURISTIC])
def disk(request, tmp_path):
    with crashes.disk_or_skip(tmp_path, request.param) as disk:
        yield disk


class Cuts:
    """Cuts the power of a disk in the second save of a run."""

    def __init__(self, zygote, disk, first_steps, copy):
        self.zygote, self.disk, self.copy = zygote, disk, copy
        self.first_step, self.first_of_linked = first_steps

    def cut(self, call="", nth=1, *, late, **how):
        """Returns the calls that began, the steps that stock Orbax lists, and what is wrong."""
        linked = how.get("linked", False)
        first = self.first_of_linked[how["in_database"]] if linked else self.first_step
        root = self.disk.replace(first)
        death = {"call": call, "nth": nth, "cut": str(self.disk.mounted), "late": late}
        calls = self.zygote.die(root, 2, death, **how)
        self.disk.after_the_cut(root, self.copy)
        steps = crashes.stock_lists(self.copy)
        removing = any(is_removal(*made.split(" ")) for made in calls[:-1])
        # Orbax removes a step file by file, and lists it until the last is gone.
        whole = steps[-1:] if removing else steps
        wrong = crashes.stock_restores(self.copy, *whole, frozen=linked)
        return calls, steps, wrong


def is_durable(calls, *, durable_path=False):
    """Whether the second step, as these calls began, was published and all of that synced."""
    if "rename /2" not in calls[:-1]:
        return False
    after = calls[calls.index("rename /2") + 1 :]
    if durable_path:  # It waits for the sync of the rename alone.
        return "fsync " in after[:-1] or after[-1] == "finished"
    # The syncs run side by side, in any order: they ended where another kind of call began.
    return any(not call.startswith("fsync") for call in after)


def first_after_syncs(run):
    """Returns where the second step is durable, as `is_durable` says."""
    return next(i for i in range(1, len(run) + 1) if is_durable(run[:i]))


@pytest.fixture
def cuts(zygote, disk, first_step, first_of_linked, tmp_path):
    return Cuts(zygote, disk, (first_step, first_of_linked), tmp_path / "copy")


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a little later"])
@pytest.mark.parametrize("how", ["stock", "default", "DurablePath", "linked", "linked in OCDBT"])
def test_a_step_that_is_finished(cuts, late, how, tell, request):
    options = {
        "stock": {"stock": True},
        "DurablePath": {"durable_path": True},
        "linked": {"linked": True, "in_database": False},
        "linked in OCDBT": {"linked": True, "in_database": True},
    }.get(how, {})
    for _ in range(_CUTS_OF_STOCK if how == "stock" else 1):
        calls, steps, wrong = cuts.cut(late=late, **options)
        assert calls[-1] == "finished"
        survived = steps[-1] == 2 and not wrong
        if not survived:
            break
    # The disk does lose what is not synced: of stock Orbax the step, or what is in its files.
    assert survived == (how != "stock"), (steps, wrong)
    found = "whole" if survived else "listed, and not restored" if wrong else "gone"
    when = f"wait_until_finished(), {'a little later' if late else 'at once'}"
    tell(TABLE, kind_of_disk(request), how, when, f"the step is {found}")
    if not wrong:
        crashes.save_again(cuts.copy, 3)


def kind_of_disk(request):
    return request.node.callspec.params["disk"]


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["xfs", NO_HEURISTIC], indirect=True)
@pytest.mark.parametrize("in_database", [False, True], ids=["files", "database"])
def test_a_save_that_links_whose_power_is_cut_at_every_call(cuts, tell, request, in_database):
    run = cuts.cut(late=False, linked=True, in_database=in_database)[0][:-1]
    end = first_after_syncs(run) + 4
    failures = []
    for position in range(run.index(next(c for c in run if c.startswith("linkat"))), end):
        call, nth = run[position], run[: position + 1].count(run[position])
        how = {"linked": True, "in_database": in_database}
        calls, steps, wrong = cuts.cut(call, nth, late=True, **how)
        if wrong or steps[-1] not in ([2] if is_durable(calls) else [1, 2]):
            failures.append(f"cut before {nth}. {call}: {steps} {wrong}")
    assert not failures, "\n".join(failures)
    how = "linked in OCDBT" if in_database else "linked"
    tell(TABLE, kind_of_disk(request), how, f"{end} calls of a save", "each step is whole")


# What ext4 loses with its heuristic, and xfs at these calls, ext4 also loses without.
AT_NIGHT = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ext4", "xfs")]


@pytest.mark.parametrize("disk", [*AT_NIGHT, NO_HEURISTIC], indirect=True)
@pytest.mark.parametrize("how", ["default", "DurablePath"])
def test_a_save_whose_power_is_cut_at_every_call(cuts, how, tell, request):
    durable_path = how == "DurablePath"
    dry, _, _ = cuts.cut(late=False, durable_path=durable_path)
    run = dry[:-1]
    begin = 0 if EVERY_POINT else run.index(MERGED)
    # Until the step is durable, and some calls of the removal of the old one.
    synced = run.index("fsync ", run.index("rename /2")) + 1
    end = synced if durable_path else first_after_syncs(run) + 4
    end = len(run) if EVERY_POINT else end
    n_cuts, without_metadata, failures = 0, 0, []
    for late in [True, False] if EVERY_POINT else [True]:
        for position in range(begin, end):
            call, nth = run[position], run[: position + 1].count(run[position])
            calls, steps, wrong = cuts.cut(call, nth, late=late, durable_path=durable_path)
            n_cuts += 1
            is_synced = is_durable(calls, durable_path=durable_path)
            try:
                assert steps[-1] in ([2] if is_synced else [1, 2])
                assert wrong == {}
                if not (cuts.copy / f"{steps[-1]}" / "_CHECKPOINT_METADATA").read_bytes():
                    # Between Orbax's rename and our sync. The arrays are there.
                    assert not is_synced
                    assert not durable_path
                    without_metadata += 1
                crashes.save_again(cuts.copy, 3)
            except Exception as error:  # noqa: BLE001 - All are told at the end.
                failures.append(f"cut before {nth}. {call}, late={late}: {error!r} {wrong}")
    assert not failures, "\n".join(failures)
    if kind_of_disk(request) == NO_HEURISTIC:  # The test sees what DurablePath is for.
        assert bool(without_metadata) != durable_path
    found = f"{without_metadata} left a listed step with empty metadata of its own"
    tell(TABLE, kind_of_disk(request), how, f"{n_cuts} cuts in a save", found)


@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
@pytest.mark.parametrize("how", ["stock", "ocdbt", "zarr"])
def test_a_step_of_two_processes_that_is_finished(disk, interposer, tmp_path, how, tell):
    for i in range(_CUTS_OF_STOCK if how == "stock" else 1):
        root = disk.mounted / f"run{i}"
        processes = reports(run_job(2, "one_save", root, logs=tmp_path / f"logs{i}", how=how))
        assert all(process["steps"] == [1] for process in processes)
        disk.cut_power(interposer, late=True)
        disk.after_the_cut(root, tmp_path / "copy")
        survived = is_whole(tmp_path / "copy", how)
        if not survived:
            break
    assert survived == (how != "stock")
    when = "wait_until_finished() of two processes, a little later"
    tell(TABLE, "ext4", how, when, "the step is whole" if survived else "it is not restored")


def is_whole(run, how):
    """Whether stock Orbax restores the step of two processes, as it was saved."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    with ocp.CheckpointManager(run) as stock:
        args = ocp.args.StandardRestore(states.targets(mesh, states.SPECS))
        try:
            return states.differences(stock.restore(1, args=args), states.values(1)) == []
        except Exception as error:  # noqa: BLE001 - Orbax's own, of many types.
            assert how == "stock", error
            return False
