"""Of two generations one stays whole; whatever goes wrong, the next snapshot can begin."""

import os
import types

import jax.numpy as jnp
import numpy as np
import pytest
from equipment.kept import plan_of

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.kept_layout import layout_of
from lazy_orbax.tiers.shelf import Full, Shelf
from lazy_orbax.tiers.slot import Slot, Writing
from lazy_orbax.tiers.snapshot_file import SnapshotError, read_snapshot

TREE = {"a": jnp.arange(6.0), "b": np.arange(4)}
PLAN = plan_of(TREE)
LAYOUT = layout_of(PLAN, TREE)
PIECES = [piece for slab in PLAN.slabs for piece in slab.pieces]


class FakeVotes:
    """What the other processes have: all steps but those in `lost`; of `late` they say nothing."""

    def __init__(self):
        self.told, self.lost, self.late = {}, set(), set()

    def tell(self, step, *, is_sealed):
        self.told[step] = is_sealed

    def settle(self, work):
        work()

    def is_common(self, step, *, timeout_s):
        return None if step in self.late else step not in self.lost


class Rig:
    """A slot that gets its room at once, and what its snapshots came to."""

    def __init__(self, place, limit_bytes=2**24):
        self.shelf, self.told, self.asked = Shelf(place), [], 0
        self.limit_bytes = limit_bytes
        link, self.votes = types.SimpleNamespace(ask=self._ask), FakeVotes()
        self.slot = Slot(self.shelf, link, ("run", "default", 0), self.votes)

    def _ask(self, message):
        self.asked += 1
        self.shelf.make_room(message["file"], message["n_bytes"], self.limit_bytes)

    def writing(self, step):
        assert self.slot.begin()
        facts = {"run": "run", "item": "default", "process": 0, "life": 1}
        facts |= {"step": step, "texts": {}}
        return Writing(self.slot, LAYOUT, facts, lambda _, error: self.told.append(error))

    def put(self, writing, pieces=PIECES):
        for piece in pieces:
            leaf = np.asarray(TREE[PLAN.leaves[piece.leaf].name])
            writing.put(piece, leaf[piece.index] + writing.step)

    def write(self, step):
        writing = self.writing(step)
        self.put(writing)
        writing.finish()

    def steps(self):
        found = [s for _, s in self.shelf.snapshots()]
        return sorted(s.step for s in found if not isinstance(s, SnapshotError))


def test_the_two_newest_are_whole_and_room_is_asked_for_once_each(place):
    rig = Rig(place)
    for step in range(5):
        rig.write(step)
    assert rig.told == [None] * 5
    assert rig.steps() == [3, 4]
    assert rig.asked == 2


def test_while_one_is_written_the_one_before_is_whole(place):
    rig = Rig(place)
    rig.write(1)
    rig.write(2)
    writing = rig.writing(3)
    rig.put(writing, PIECES[:1])
    assert rig.steps() == [2]
    assert not rig.slot.begin()
    writing.end()
    assert rig.steps() == [2]
    assert isinstance(rig.told[-1], KeeperError)
    rig.write(4)  # Into the same file as the one that was given up.
    assert rig.steps() == [2, 4]


def test_one_that_lacks_a_piece_is_not_sealed(place):
    rig = Rig(place)
    writing = rig.writing(1)
    rig.put(writing, PIECES[:-1])
    writing.finish()
    assert rig.steps() == []
    assert "1 of 2 pieces" in str(rig.told[-1])
    rig.write(2)
    assert rig.steps() == [2]


def test_without_room_it_is_told_of_once_and_the_next_may_begin(place):
    rig = Rig(place, limit_bytes=2**12)
    rig.write(1)
    assert [type(error) for error in rig.told] == [Full]
    rig.limit_bytes = 2**24
    rig.write(2)
    assert rig.steps() == [2]


def test_the_next_life_goes_on_where_the_last_one_ended(place):
    rig = Rig(place)
    for step in (1, 2, 3):
        rig.write(step)
    again = Rig(place)
    again.write(4)  # Not over the newest.
    assert again.steps() == [3, 4]
    newest = max((s for _, s in again.shelf.snapshots()), key=lambda s: s.serial)
    assert newest.step == 4


@pytest.mark.parametrize("remove", [os.unlink, lambda path: os.truncate(path, 0)])
def test_files_that_somebody_removed_or_cut_are_made_again(place, remove):
    """A write behind the end of one that was cut would end this process."""
    rig = Rig(place)
    rig.write(1)
    rig.write(2)
    for name in rig.slot.names:
        remove(rig.shelf.path_of(name))
    rig.write(3)
    assert rig.told == [None] * 3
    assert rig.steps() == [3]


def test_nothing_that_goes_wrong_is_raised(place, monkeypatch):
    rig = Rig(place)
    writing = rig.writing(1)
    rig.put(writing)
    monkeypatch.setattr(rig.slot, "seal", lambda *_: 1 / 0)
    writing.finish()
    assert isinstance(rig.told[0], ZeroDivisionError)
    rig.put(writing)  # It is over.
    writing.finish()
    writing.end()
    assert len(rig.told) == 1


@pytest.mark.parametrize("broken", [0, 1])
def test_a_torn_file_is_no_reason_to_stop(place, broken):
    rig = Rig(place)
    rig.write(1)
    rig.write(2)
    path = rig.shelf.path_of(rig.slot.names[broken])
    with open(path, "r+b") as file:
        file.write(b"x")
    with pytest.raises(SnapshotError):
        read_snapshot(path)
    again = Rig(place)
    again.write(3)
    assert 3 in again.steps()
    assert len(again.steps()) == 2


def test_a_step_that_another_process_lost_gives_way_and_the_common_one_stays(place):
    rig = Rig(place)
    rig.votes.lost = {3, 4, 5}
    for step in range(1, 6):
        rig.write(step)
        assert 2 in rig.steps() or step < 3
    assert rig.steps() == [2, 5]
    rig.write(6)
    assert rig.steps() == [2, 6]
    rig.write(7)
    assert rig.steps() == [6, 7]
    assert rig.votes.told == dict.fromkeys(range(1, 8), True)


def test_nothing_is_overwritten_while_another_process_is_behind(place):
    rig = Rig(place)
    rig.write(1)
    rig.write(2)
    rig.votes.late = {2}
    rig.write(3)
    assert rig.steps() == [1, 2]
    assert "has not told" in str(rig.told[-1])
    assert rig.votes.told[3] is False
    rig.votes.late = set()
    rig.write(4)
    assert rig.steps() == [2, 4]


@pytest.mark.parametrize("is_late", [False, True])
def test_where_steps_go_back_the_newest_that_all_have_stays(place, is_late):
    """Each process decides that then: some have begun another one since, and some have not."""
    rig = Rig(place)
    rig.write(1)
    rig.write(2)
    rig.votes.late = {2} if is_late else set()
    rig.slot.begin_life(FakeVotes(), None)
    rig.write(3)
    assert rig.steps() == [1 if is_late else 2, 3]
    assert rig.told == [None] * 3


def test_what_a_life_begins_with_stays_until_all_have_something_newer(place):
    rig = Rig(place)
    rig.write(1)
    rig.write(2)  # Others never had it: the job goes on from step 1.
    paths = {s.step: s.path for _, s in rig.shelf.snapshots()}
    again = Rig(place)
    again.slot.begin_life(again.votes, paths[1])
    again.votes.lost = {3}
    again.write(3)
    assert again.steps() == [1, 3]
    again.write(4)
    assert again.steps() == [1, 4]
    again.write(5)
    assert again.steps() == [4, 5]
