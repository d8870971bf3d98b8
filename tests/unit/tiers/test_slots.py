"""What became of snapshots is counted, and a warning is not said at each step."""

import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from equipment.kept import plan_of

from lazy_orbax.errors import KeeperError, TreeError
from lazy_orbax.tiers.kept_layout import layout_of
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.slot import Slot
from lazy_orbax.tiers.slots import Slots

TREE = {"a": jnp.ones(2)}
PLAN = plan_of(TREE)


def gone():
    """A snapshot that is whole counts, also where no keeper can be started."""
    raise KeeperError("nobody is there")


@pytest.fixture
def slots(place):
    shelf = Shelf(place)

    def ask(message):
        shelf.make_room(message["file"], message["n_bytes"], 2**24)

    return Slots(shelf, types.SimpleNamespace(ask=ask, keep_up=gone), "run")


def test_each_snapshot_is_counted_once(slots):
    layout = layout_of(PLAN, TREE)
    lost = slots.begin(1, "default", layout, {})
    assert slots.begin(2, "default", layout, {}) is None
    lost.end()
    lost.end()
    kept(slots, 3)
    report = slots.report
    assert (report.kept, report.skipped, report.failed, report.newest_step) == (1, 1, 1, 3)
    assert report.error is None
    assert slots.close() == slots.files(["default"])


def test_nobody_who_can_be_told_of_a_skipped_step_is_no_reason_to_stop(slots, monkeypatch):
    told_in, is_told = [], threading.Event()

    def tell(*_, is_sealed):
        told_in.append(threading.current_thread().name)
        is_told.set()
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    layout = layout_of(PLAN, TREE)
    slots.begin(1, "default", layout, {})
    monkeypatch.setattr(Slot, "tell", tell)
    assert slots.begin(2, "default", layout, {}) is None
    assert is_told.wait(60)
    assert told_in == ["lazy_orbax-skip"]
    assert slots.report.skipped == 1


def test_the_same_failure_is_said_once(slots, caplog):
    for step in range(3):
        slots.failed(step, ValueError("why"))
    slots.failed(3, ValueError("another"))
    assert [r.message for r in caplog.records] == [
        "Step 0 is not kept in memory: why",
        "Step 3 is not kept in memory: another",
    ]
    assert slots.report.failed == 4


def test_a_later_life_has_a_higher_number_where_clocks_go_back_too(slots, monkeypatch):
    slots.begin_life()
    lives = [slots.life]
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    slots.begin_life()
    lives.append(slots.life)
    kept(slots, 1)
    slots.close()
    other = Slots(slots.shelf, slots._link, "run")  # Another process, some time later.
    other.begin_life()
    lives.append(other.life)
    assert lives == sorted(set(lives))


def test_lives_that_know_not_of_each_other_are_told_apart(place, monkeypatch):
    """Two jobs go on from one life, on other machines each, while their clocks are behind it.

    All of these machines may be there again, and nobody may put together what the two jobs did.
    """
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    lives = []
    for i in range(2):
        shelf = Shelf(f"{place}{i}")

        def ask(told, shelf=shelf):
            shelf.make_room(told["file"], told["n_bytes"], 2**24)

        link = types.SimpleNamespace(ask=ask, keep_up=gone)
        slots = Slots(shelf, link, "run")
        slots.life = 7
        kept(slots, 1)
        slots.close()
        slots = Slots(shelf, link, "run")
        slots.begin_life()
        lives.append(slots.life)
    assert min(lives) > 7
    assert lives[0] != lives[1]


def kept(slots, step):
    writing = slots.begin(step, "default", layout_of(PLAN, TREE), {})
    (piece,) = (piece for slab in PLAN.slabs for piece in slab.pieces)
    writing.put(piece, jnp.ones(2).__array__())
    writing.finish()


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_life_ends_where_steps_go_back(slots, is_slow):
    """On all processes alike: also on one that passed over steps."""
    slots.life, lives, running = 7, [], []
    ascending = [(1, "a"), (1, "b"), (2, "a"), (3, "a"), (3, "b")]
    for steps in (ascending, ascending[2:], [(3, "a")]):
        for step, item in steps:
            assert slots.offer(step, item)
            writing = slots.begin(step, item, layout_of(PLAN, TREE), {})
            if is_slow and writing is not None:
                running.append(writing)
            elif not is_slow:
                writing.end()
            lives.append(slots.life)
        while running:
            running.pop().end()
    # Each process comes to these numbers by itself.
    assert lives == [7] * 5 + [8] * 3 + [9]
    assert slots.report.skipped == (4 if is_slow else 0)


def test_a_step_is_taken_once_with_a_save_to_storage(slots):
    layout = layout_of(PLAN, TREE)
    slots.begin_along(1, "default", layout, {}).end()
    assert not slots.offer(1, "default")
    slots.begin(2, "default", layout, {})
    life = slots.life
    assert slots.begin_along(3, "default", layout, {}) is None  # The one before is on its way.
    assert slots.offer(3, "default")
    assert slots.begin_along(3, "default", layout, {}) is None
    assert slots.life == life


def test_a_tree_that_cannot_be_kept_takes_no_place(slots):
    tree = {"a": jnp.ones(2), "z": object()}
    with pytest.raises(TreeError, match="z"):
        slots.begin(1, "default", layout_of(plan_of({"a": jnp.ones(2)}), tree), {})
    assert slots.begin(2, "default", layout_of(PLAN, TREE), {}) is not None
