"""One step in the memory of several machines becomes one ordinary step of a tier, or none."""

import json
import os
import pathlib
import shutil
import tempfile
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.machines import machines, promoted
from equipment.trees import assert_same, on_mesh

import lazy_orbax
from lazy_orbax import _paths
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers import promoting_parts, promoting_share
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.tiers import meeting
from lazy_orbax.tiers.kept_steps import kept_steps
from lazy_orbax.tiers.meeting import Meeting
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.tier import Machine

RUN = "/run"


def state(mesh, step=3):
    whole = np.arange(64, dtype=np.float32).reshape(8, 8) + step
    return {
        "divided": on_mesh(whole, mesh, "a", "b"),
        "repeated": on_mesh(np.arange(6, dtype=np.int16), mesh),
        "layers": [{"b": np.full(3, step, np.int16)}, {"b": np.zeros(2)}],
        "n": step,
        "nothing": None,
        "key": jax.random.key(step),
    }


@pytest.fixture(scope="module")
def first():
    """The memory of one machine, with steps 3 and 4."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    with lazy_orbax.Keeper(RUN, directory=str(above / "k")) as keeper:
        for step in (3, 4):
            keeper.save(step, state(mesh, step))
            keeper.wait()
            assert keeper.report.newest_step == step
        yield str(above / "k")
    shutil.rmtree(above)


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(meeting, "_LOOK_S", 0.01)
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield above
    shutil.rmtree(above)


@pytest.fixture
def tier(tmp_path):
    return lazy_orbax.Tier(tmp_path / "tier", every_s=60, keep=1)


def kept(memory, first, of, *steps):
    """Returns the memory of machines that all have these steps."""
    places = machines(memory, first, of)
    for place in places:
        without(place, *({3, 4} - set(steps)))
    return places


def without(place, *steps):
    """Takes steps out of the memory of a machine."""
    shelf = Shelf(place)
    for file, snapshot in shelf.snapshots():
        if snapshot.step in steps:
            shelf.remove(file)


def lives_in(place):
    return {snapshot.facts["life"] for _, snapshot in Shelf(place).snapshots()}


def listed(tier):
    if not os.path.isdir(tier.path):
        return []
    with ocp.CheckpointManager(tier.path) as manager:
        return list(manager.all_steps())


def test_stock_orbax_restores_what_machines_brought_together(memory, first, tier, mesh):
    of = 4
    places = kept(memory, first, of, 3)
    assert promoted(RUN, [tier] * of, places) == [3] * of
    assert promoted(RUN, [tier] * of, places) == [None] * of  # Nothing is newer.
    with ocp.CheckpointManager(tier.path, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == [3]
        found = stock.restore(3, args=ocp.args.StandardRestore(state(mesh, 0)))
    assert_same(found, state(mesh))
    assert lazy_orbax.verify(f"{tier.path}/3").is_whole
    assert os.listdir(tier.path) == ["3"]
    # Nothing is there twice: what all machines have, one of them wrote.
    digests = [
        json.loads(pathlib.Path(f"{tier.path}/3/default/{_paths.DIGESTS}/process_{i}").read_text())
        for i in range(of)
    ]
    written = [(leaf[0], str(box)) for one in digests for leaf in one["leaves"] for box in leaf[3]]
    assert len(written) == len(set(written))


def test_items_and_strings_are_brought_together(memory, tier):
    with lazy_orbax.Keeper(RUN, directory=str(memory / "k")) as keeper:
        for item in ("x", "y"):
            keeper.save(7, {"a": np.arange(3), "text": f"of {item}"}, item=item)
            keeper.wait()
        places = machines(memory, str(memory / "k"), 2)
    assert promoted(RUN, [tier] * 2, places) == [7, 7]
    for item in ("x", "y"):
        found = lazy_orbax.load(f"{tier.path}/7/{item}")
        assert (found["text"], found["a"].tolist()) == (f"of {item}", [0, 1, 2])


def test_disks_that_only_have_the_same_name_get_nothing(memory, first, tier, tmp_path, monkeypatch):
    for name in ("MEET_S", "TAKE_S"):
        monkeypatch.setattr(promoting_parts, name, 0.5)
    other = lazy_orbax.Tier(tmp_path / "other", every_s=60)
    found = promoted(RUN, [tier, other], kept(memory, first, 2, 3))
    for error in found:
        assert "do all machines see one file system" in str(error)
    assert listed(tier) == listed(other) == []


def test_a_step_that_another_machine_has_not_is_not_listed(memory, first, tier, monkeypatch):
    monkeypatch.setattr(promoting_parts, "_SEALED_S", 0.0)
    places = kept(memory, first, 2, 3, 4)
    without(places[1], 4)
    leader, follower = promoted(RUN, [tier] * 2, places)
    assert "the machine of process 1 gave up: step 4 did not get whole" in str(leader)
    assert "step 4 did not get whole" in str(follower)
    assert listed(tier) == []
    without(places[0], 4)
    assert promoted(RUN, [tier] * 2, places) == [3, 3]
    kept(memory, first, 2, 4)
    assert promoted(RUN, [tier] * 2, places) == [4, 4]
    assert os.listdir(tier.path) == ["4"]


def test_a_part_that_changed_is_not_joined(memory, first, tier, monkeypatch):
    write = promoting_share.write_part

    def changed(*how):
        return write(*how) ^ (how[-2] == 1)

    places = kept(memory, first, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(promoting_share, "write_part", changed)
        leader, follower = promoted(RUN, [tier] * 2, places)
    assert "part 1 is not what was written there" in str(leader)
    assert "did not list step 3" in str(follower)
    assert listed(tier) == []
    assert promoted(RUN, [tier] * 2, places) == [3, 3]


def test_who_writes_after_the_leader_gave_up_leaves_nothing(memory, first, tier, monkeypatch):
    places, begun, ended = kept(memory, first, 2, 3), threading.Event(), threading.Event()
    write, lead = promoting_share.write_part, promoting_parts.lead

    def late(*how):
        if how[-2] == 0:
            assert begun.wait(60)
            raise KeeperError("it gives up")
        begun.set()
        assert ended.wait(60)
        shutil.rmtree(f"{tier.path}/3.orbax-checkpoint-tmp")  # As the next one would do.
        return write(*how)

    def led(*how):
        try:
            return lead(*how)
        finally:
            ended.set()

    monkeypatch.setattr(promoting_share, "write_part", late)
    monkeypatch.setattr("lazy_orbax.handlers.promoting.lead", led)
    leader, follower = promoted(RUN, [tier] * 2, places)
    assert "it gives up" in str(leader)
    assert "has given this step up" in str(follower)
    assert os.listdir(tier.path) == []


def test_a_call_in_which_one_was_killed_is_given_up_and_the_next_one_heard(memory, first, tier):
    places, met = kept(memory, first, 2, 3), Meeting(tier.path)
    killed = met.called(lives_in(places[1]))
    token = killed.__enter__()
    met.tell(token, "step", {"step": 3, "life": 0, "items": ["default"], "parts": [0, 1]})
    met.tell(token, "taken-1", {"step": 3})
    found = []
    follower = threading.Thread(
        target=lambda: found.append(promote(RUN, tier, places[1], Machine((1,), 2)))
    )
    follower.start()
    while met.told(token, "lost-1") is None:
        assert follower.is_alive()
    assert promote(RUN, tier, places[0], Machine((0,), 2)) == 3
    follower.join()
    assert found == [3]
    assert os.listdir(tier.path) == ["3"]


@pytest.mark.parametrize(
    ("items", "directory", "why"),
    [
        (["default"], "../victim", "'../victim', which is not in"),
        (["default", "more"], "3", "step 3 did not get whole"),
        ([5], "3", "step 3 did not get whole"),
    ],
)
def test_what_a_stranger_says_in_a_tier_leads_nowhere_else(  # noqa: PLR0913
    memory, first, tier, tmp_path, monkeypatch, items, directory, why
):
    monkeypatch.setattr(promoting_parts, "_SEALED_S", 0.0)
    places, met = kept(memory, first, 2, 3), Meeting(tier.path)
    (life,) = lives_in(places[1])
    with met.called(lives_in(places[1])) as token:
        met.tell(token, "step", {"step": 3, "life": life, "items": items, "parts": [0, 1]})
        met.tell(token, "item0", {"directory": directory})
        with pytest.raises(KeeperError, match=why):
            promote(RUN, tier, places[1], Machine((1,), 2))
        assert why in met.told(token, "lost-1")["why"]
    assert os.listdir(tmp_path) == ["tier"]


def test_what_is_not_understood_is_told_to_those_who_wait(memory, first, tier):
    places, met = kept(memory, first, 2, 3), Meeting(tier.path)
    with met.called(lives_in(places[1])) as token:
        met.tell(token, "step", {"step": 3, "parts": [0, 1]})
        with pytest.raises(KeyError):
            promote(RUN, tier, places[1], Machine((1,), 2))
        assert met.told(token, "lost-1") == {"why": "'life'"}


def test_a_machine_that_the_job_left_does_not_come(memory, first, tier, monkeypatch):
    for name in ("MEET_S", "TAKE_S"):
        monkeypatch.setattr(promoting_parts, name, 0.0)
    places, met = kept(memory, first, 2, 3), Meeting(tier.path)
    (life,) = lives_in(places[1])
    for others, came in (({life + 1}, {}), ({life, life + 1}, {1: {"processes": [1]}})):
        with met.called(others) as token:
            with pytest.raises(KeeperError, match="did not say in"):
                promote(RUN, tier, places[1], Machine((1,), 2))
            assert met.told_by_all(token, "here") == came


def test_a_machine_that_the_job_left_disturbs_nobody(memory, first, tier):
    """Its leader still has its last step, and comes while a later life brings one there."""
    places, met = kept(memory, first, 2, 3, 4), Meeting(tier.path)
    assert promoted(RUN, [tier] * 2, places) == [4, 4]
    (life,) = lives_in(places[0])
    begun = pathlib.Path(tier.path) / f"9{_paths.TEMPORARY}"
    begun.mkdir()
    (begun / _paths.PROMOTED).write_text(json.dumps({"run": RUN}))
    with met.called({life + 1}) as token:
        assert promote(RUN, tier, places[0], Machine((0,), 2)) is None  # Nothing is newer.
        shutil.rmtree(f"{tier.path}/4")
        with pytest.raises(KeeperError, match="a later life of the job"):
            promote(RUN, tier, places[0], Machine((0,), 2))
        assert met.token() == token
        assert sorted(os.listdir(tier.path)) == [begun.name, _paths.MEETING]
    assert promoted(RUN, [tier] * 2, places) == [4, 4]
    begun.mkdir()
    (begun / _paths.PROMOTED).write_text(json.dumps({"run": RUN}))
    assert promoted(RUN, [tier] * 2, places) == [None, None]
    assert os.listdir(tier.path) == ["4"]


def test_a_leader_whose_call_another_one_ends_waits_no_longer(memory, first, tier):
    places, met = kept(memory, first, 2, 3), Meeting(tier.path)
    found = []

    def lead():
        with pytest.raises(KeeperError, match="another program calls the machines"):
            promote(RUN, tier, places[0], Machine((0,), 2))
        found.append("given up")

    leader = threading.Thread(target=lead)
    leader.start()
    while met.token() is None:
        assert leader.is_alive()
    with met.called(lives_in(places[0])):
        leader.join(60)
    assert found == ["given up"]


def test_what_the_job_went_back_from_is_brought_nowhere(memory, tier):
    with lazy_orbax.Keeper(RUN, directory=str(memory / "k")) as keeper:
        for step in (99, 100, 6):
            if step == 6:  # It began with 100, and then with an older one after all.
                newest = kept_steps(keeper.slots.shelf, RUN)[0]
                keeper.slots.begin_life({"default": newest.paths[0]})
            keeper.save(step, {"a": np.full(3, step)})
            keeper.wait()
        places = machines(memory, str(memory / "k"), 2)
    assert {snapshot.step for _, snapshot in Shelf(places[0]).snapshots()} == {100, 6}
    (pathlib.Path(tier.path) / "50").mkdir(parents=True)
    assert promoted(RUN, [tier] * 2, places) == [None, None]
    os.rmdir(f"{tier.path}/50")
    assert promoted(RUN, [tier] * 2, places) == [6, 6]
