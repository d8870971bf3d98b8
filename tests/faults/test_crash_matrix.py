"""A process killed before every call of a save that changes the file system.

An interposer logs the calls below the run's directory, TensorStore's as Python's, and kills the
process before any one of them, or after the last. They are made one after the other, under a lock,
so that nothing changes the file system between the end of one and the start of the next: killed
after a call is killed before the next one.

The save is the second of a run that keeps one step, so that the removal of the old one is among the
points. Threads make the order of some calls differ from run to run, so a point is not a number but
a name: the n-th call of that kind (random names aside), of all that the dry runs made. A save that
makes fewer of a kind, because TensorStore has put more into one write, is killed after its end.
"""

from __future__ import annotations

import shutil

import pytest
from faults import crashes

MERGED = "rename /2.orbax-checkpoint-tmp/default.orbax-checkpoint-tmp/manifest.ocdbt"


def check(root, calls, *, frozen=False):
    """The invariants, after `calls` began of which the last was not made."""
    made = [call.split() for call in calls[:-1]]
    removing = [i for i, (call, *file) in enumerate(made) if is_removal(call, *file)]
    if removing:  # The old step goes only when the new one is durable: listed, and that synced.
        assert made.index(["rename", "/2"]) < made.index(["fsync"]) < removing[0]
    steps = crashes.stock_lists(root)
    assert max(steps) == (2 if crashes.published(calls, 2) else 1)
    assert 1 in steps or removing
    # Orbax removes a step file by file, and lists it until the last is gone.
    whole = set(steps) - ({1} if removing else set())
    assert crashes.stock_restores(root, *whole, frozen=frozen) == {}
    crashes.save_again(root, 3)


def is_removal(call, file=""):
    return call in ("unlink", "unlinkat", "rmdir") and f"{file}/".startswith("/1/")


# At the first call of each kind; and at every call, at night.
@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("durable_path", [False, True], ids=["default", "DurablePath"])
def test_a_save_killed_at_every_call(zygote, first_step, tmp_path, tell, durable_path, everywhere):
    root = tmp_path / "run"
    deaths, failures = [], []

    def kill(call="", nth=1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first_step, root)
        calls = zygote.die(root, 2, {"call": call, "nth": nth}, durable_path=durable_path)
        deaths.append((calls[-1], crashes.published(calls, 2)))
        # Not all saves make all calls: one in twenty syncs a lock of `_sharding`, say.
        assert calls[-1] == call or calls.count(call) < nth
        try:
            check(root, calls)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"killed before {nth}. {call or 'nothing'}: {error!r}")
        return calls

    # Dry runs, which are killed at the end. They differ in length.
    runs = [kill()[:-1] for _ in range(3 if everywhere else 2)]
    if durable_path:  # Both do the same until the item is merged, and after the step is durable.
        runs = [
            run[run.index(MERGED) : run.index("fsync ", run.index("rename /2"))] for run in runs
        ]
    points = {call: max(run.count(call) for run in runs) for run in runs for call in run}
    for call, n_calls in points.items():
        for nth in range(1, (n_calls if everywhere else 1) + 1):
            kill(call, nth)
    assert not failures, "\n".join(failures)
    kinds = {call for call, _ in deaths} - {"finished"}
    assert {MERGED, "rename /2"} <= kinds
    tell(
        "Saves killed at every call that changes the file system",
        "DurablePath, where it differs" if durable_path else "default",
        f"{max(map(len, runs))} calls",
        f"{len(deaths)} kills",
        f"{sum(call == 'finished' for call, _ in deaths)} of them at the end",
        f"{sum(published for _, published in deaths)} after the step was listed",
        f"{len(kinds)} kinds of calls",
    )


# At the links; and everywhere, at night.
@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_database", [False, True], ids=["files", "database"])
def test_a_save_that_links_killed_at_every_call(
    zygote, first_of_linked, tmp_path, tell, everywhere, in_database
):
    root = tmp_path / "run"
    failures, n_kills = [], 0

    def kill(call="", nth=1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first_of_linked[in_database], root)
        before = content_of(root / "1")
        death = {"call": call, "nth": nth}
        calls = zygote.die(root, 2, death, linked=True, in_database=in_database)
        try:
            check(root, calls, frozen=True)
            after = content_of(root / "1")
            assert after.items() <= before.items(), "the older step was changed"
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"killed before {nth}. {call or 'nothing'}: {error!r}")
        return calls

    runs = [kill()[:-1] for _ in range(3 if everywhere else 1)]
    links = [call for call in runs[0] if call.startswith("linkat")]
    assert len(links) == 4 or in_database, "two leaves of two chunks"
    assert links
    if not everywhere:
        runs = [[*links, "rename /2"]]
    points = {call: max(run.count(call) for run in runs) for run in runs for call in run}
    for call, n_calls in points.items():
        for nth in range(1, n_calls + 1):
            kill(call, nth)
            n_kills += 1
    assert not failures, "\n".join(failures)
    tell(
        "Saves killed at every call that changes the file system",
        f"linked {'in OCDBT' if in_database else 'files'}, {'all' if everywhere else 'the links'}",
        f"{max(map(len, runs))} calls",
        f"{n_kills} kills",
    )


def content_of(step):
    """What is in the arrays of a step; nothing of a file that is gone."""
    files = (path for path in (step / "default").rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}
