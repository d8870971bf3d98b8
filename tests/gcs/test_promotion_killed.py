"""A promotion to `gs://` killed at an exact request: what others find there, and the next one."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile

import pytest
from gcs.proxy import Fault
from gcs.uploads import COMMIT, DATA, ITEM_COMMIT, MERGED, STEP_METADATA, TREE

from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.messages import asked

MARK = r"upload \S*/2/lazy_orbax_promoted.json"
UNLIST = r"delete \S*/1/commit_success.txt"
REMOVE = r"delete \S*/1/default/"
REMOVE_MARK = r"delete \S*/1/lazy_orbax_promoted.json"
# What, the pattern, and which steps are listed before that. By day one, at night all.
POINTS = [
    ("the step's metadata", STEP_METADATA, [1]),
    ("the mark", MARK, [1]),
    ("the first data", DATA, [1]),
    ("_METADATA", TREE, [1]),
    ("the merge's manifest", MERGED, [1]),
    ("the item's commit file", ITEM_COMMIT, [1]),
    ("the commit file", COMMIT, [1]),
    ("the end of the old step", UNLIST, [1, 2]),
    ("the first removal", REMOVE, [2]),
    ("the last removal", REMOVE_MARK, [2]),
]
# What says that a step was begun; the first one may come before the second one, or after it.
MARKS = {"_CHECKPOINT_METADATA", "lazy_orbax_promoted.json"}
BY_DAY = {("the commit file", "stall")}


@pytest.fixture(scope="module")
def witness(start_for_module):
    """Another process, which only knows the address."""
    return start_for_module()


@pytest.fixture
def memory():
    """The directory of a keeper that is not there yet."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield str(above / "k")
    with contextlib.suppress(OSError), connected(str(above / "k")) as peer:
        asked(peer, {"do": "stop", "discard": True}, timeout_s=60)
    shutil.rmtree(above)


def assert_second_step_alone(witness, tier):
    """Asserts that stock Orbax lists step 2 and no other, and restores what was kept."""
    assert witness.do("open", tier, stock=True) == [2]
    assert witness.do("wrong", 2) == []
    assert witness.do("problems", 2) == []


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(
            (action, pattern, listed),
            id=f"{'before' if action == 'stall' else 'after'} {what}",
            marks=[] if (what, action) in BY_DAY else pytest.mark.slow,
        )
        for what, pattern, listed in POINTS
        for action in ("stall", "mute")
    ],
)
def test_a_killed_promotion(start, witness, proxy, root, memory, point):
    action, pattern, listed = point
    run, tier = f"{root}/run", f"{root}/tier"
    promoter = start()
    for step in (1, 2):
        witness.do("keep", run, memory, step)
        if step == 1:
            assert promoter.do("promote", run, memory, tier) == 1
    met = Fault(pattern, action, times=1)
    with proxy.breaking(met):
        promoter.begin("promote", run, memory, tier)
        met.await_request()
        promoter.kill()
    after = {COMMIT: [1, 2], UNLIST: [2]}.get(pattern, listed) if action == "mute" else listed
    assert witness.do("open", tier, stock=True) == after
    assert witness.do("wrong", *after) == []
    for step in {1, 2} - {*after}:
        is_left = MARKS & {*witness.do("objects", step)}
        assert not is_left or f"{tier}/{step} " in witness.do("command", "clean", tier)[1]
    assert start().do("promote", run, memory, tier) in (2, None)
    assert_second_step_alone(witness, tier)
    assert not witness.do("objects", 1)


def test_what_is_in_a_bucket_is_found_when_memory_is_gone(start, root, memory):
    run, tier = f"{root}/run", f"{root}/tier"
    job = start()
    job.do("keep", run, memory, 1)
    assert job.do("promote", run, memory, tier) == 1
    assert job.do("newest", run, memory, tier) == (1, "memory", [])
    assert job.do("newest", run, memory, tier) == (1, tier, [])  # It ended well, and left nothing.


def kept_on_two_machines(witness, leader, run, memory, tier):
    """Brings step 1 to a tier, and keeps step 2. Returns the memory of each machine."""
    witness.do("keep", run, memory, 1)
    assert leader.do("promote_together", run, memory, tier, 2) == [1, 1]
    witness.do("keep", run, memory, 2)
    return witness.do("divide", memory, 2)


MET = r"\S*/lazy_orbax_meeting/"
LEADER_POINTS = [
    ("the call", rf"upload {MET}call"),
    ("the step", rf"upload {MET}\w+/step"),
    ("the item", rf"upload {MET}\w+/item0"),
    ("the merge's manifest", MERGED),
    ("the commit file", COMMIT),
    ("the end of the call", rf"delete {MET}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stall", "mute"])
@pytest.mark.parametrize("pattern", [pytest.param(p, id=what) for what, p in LEADER_POINTS])
def test_a_killed_leader(start, witness, proxy, root, memory, pattern, action):  # noqa: PLR0913
    run, tier = f"{root}/run", f"{root}/tier"
    leader, follower, met = start(), start(), Fault(pattern, action, times=1)
    places = kept_on_two_machines(witness, leader, run, memory, tier)
    with proxy.breaking(met):
        follower.begin("promote_part", run, places[1], tier, 1, 2)
        leader.begin("promote_part", run, places[0], tier, 0, 2)
        met.await_request()
        leader.kill()
    is_listed = pattern.startswith("delete") or (pattern == COMMIT and action == "mute")
    listed = [1, 2] if is_listed else [1]
    assert witness.do("open", tier, stock=True) == listed
    assert witness.do("wrong", *listed) == []
    if witness.do("objects", "lazy_orbax_meeting"):
        assert f"{tier}/lazy_orbax_meeting " in witness.do("command", "clean", tier)[1]
    assert start().do("promote_part", run, places[0], tier, 0, 2) == (None if is_listed else 2)
    assert follower.end().result == 2
    assert_second_step_alone(witness, tier)
    assert not witness.do("objects", 1)
    assert not witness.do("objects", "lazy_orbax_meeting")


FOLLOWER_POINTS = [
    ("here", rf"upload {MET}\w+/here-1"),
    ("taken", rf"upload {MET}\w+/taken-1"),
    ("its data", r"upload \S*/2/default/ocdbt.process_1-\w+/d/"),
    ("done", rf"upload {MET}\w+/done0-1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stall", "mute"])
@pytest.mark.parametrize("pattern", [pytest.param(p, id=what) for what, p in FOLLOWER_POINTS])
def test_a_killed_follower(start, witness, proxy, root, memory, pattern, action):  # noqa: PLR0913
    run, tier = f"{root}/run", f"{root}/tier"
    leader, follower, met = start(), start(), Fault(pattern, action, times=1)
    places = kept_on_two_machines(witness, leader, run, memory, tier)
    with proxy.breaking(met):
        leader.begin("promote_part", run, places[0], tier, 0, 2)
        follower.begin("promote_part", run, places[1], tier, 1, 2)
        met.await_request()
        follower.kill()
    follower = start()
    follower.begin("promote_part", run, places[1], tier, 1, 2)
    first = leader.end()
    if first.error:  # The next program of that machine said so.
        assert "its program was killed" in first.message
        assert leader.do("promote_part", run, places[0], tier, 0, 2) == 2
    else:
        assert first.result == 2
    assert follower.end().result in (2, None)
    assert_second_step_alone(witness, tier)
    assert not witness.do("objects", "lazy_orbax_meeting")


@pytest.mark.slow
def test_machines_bring_a_step_to_a_bucket_together(start, witness, root, memory):
    run, tier, job = f"{root}/run", f"{root}/tier", start()
    for step in (1, 2):
        witness.do("keep", run, memory, step)
        assert job.do("promote_together", run, memory, tier, 2) == [step, step]
    assert_second_step_alone(witness, tier)
    assert not witness.do("objects", 1)
    assert not witness.do("objects", "lazy_orbax_meeting")
