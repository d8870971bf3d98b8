"""Whose turn it is to be verified: each item of each tree has its own."""

import gc
import json
import weakref

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import join_threads
from equipment.trees import on_mesh

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.proof import Evidence, prover_of
from lazy_orbax.integrity.proof_turns import Turns
from lazy_orbax.plan.slabs import Plan


@pytest.fixture
def plan():
    """A plan whose programs are ready."""
    plan = Plan((), (), ())
    prover_of(plan).prepare(plan)
    return plan


def looked_at(turns, plan, n_saves, every, item="run/*"):
    """The numbers of the saves that were looked at, all of which were proven."""
    found = []
    for number in range(1, n_saves + 1):
        if (evidence := turns.next(plan, item, every)) is not None:
            assert evidence.conclude() is None
            found.append(number)
    return found


def verified(directory):
    """Step and item of everything that was verified."""
    files = [file for file in directory.rglob("process_0") if _is_verified(file)]
    return sorted((int(file.parents[2].name), file.parents[1].name) for file in files)


def _is_verified(file):
    return file.parent.name == digest_file.DIRECTORY and "proof" in json.loads(file.read_bytes())


@pytest.mark.parametrize(
    ("every", "wanted"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7]), (2, [1, 3, 5, 7]), (3, [1, 4, 7])]
)
def test_every_so_manieth_save_is_looked_at(plan, every, wanted):
    assert looked_at(Turns(), plan, 7, every) == wanted


def test_items_that_share_a_plan_share_no_turns(plan):
    turns, found = Turns(), []
    for _ in range(6):
        for i in range(2):
            found.append(turns.next(plan, f"run/*/{i}", 2))
            assert found[-1] is None or found[-1].conclude() is None
    # The second item waits once for its turn, because the first had one of the plan's just before.
    assert [e is not None for e in found] == [True, False, False, True] * 3


def test_a_new_run_of_a_tree_that_was_verified_just_now_waits_for_its_turn(plan):
    turns = Turns()
    assert looked_at(turns, plan, 10, 10, "first/*") == [1]
    assert looked_at(turns, plan, 25, 10, "second/*") == [1, 11, 21]
    assert looked_at(turns, plan, 25, 10, "third/*") == [6, 16]


def test_of_saves_under_ever_new_names_every_so_manieth_is_looked_at(plan):
    turns, found = Turns(), []
    for i in range(1000):
        evidence = turns.next(plan, f"named/{i}", 100)
        if evidence is not None:
            assert evidence.conclude() is None
            found.append(i)
    assert found == [*range(0, 1000, 100)]


def test_programs_are_compiled_for_saves_under_ever_new_names_too():
    plan, turns = Plan((), (), ()), Turns()
    begun = []
    for i in range(21):
        turns.next(plan, f"named/{i}", 100)
        prover_of(plan).begin_to_prepare(plan, 100, lower_priority=lambda i=i: begun.append(i))
    join_threads("lazy_orbax-proof")
    assert begun == [19]


def test_what_was_not_proven_is_looked_at_again(plan):
    turns = Turns()
    for _ in range(3):
        evidence = turns.next(plan, "run/*", 100)
        assert evidence is not None
    assert evidence.conclude() is None
    assert looked_at(turns, plan, 99, 100) == []
    assert turns.next(plan, "run/*", 100) is not None


def test_turns_keep_no_plan_alive(plan):
    turns, again = Turns(), Plan((), (), ())
    prover_of(again).prepare(again)
    evidence = turns.next(again, "run/*", 1)
    assert isinstance(evidence, Evidence)
    gone = weakref.ref(again)
    del again, evidence
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("n_handlers", [1, 2])
def test_two_items_of_one_tree_are_both_verified(mesh, tmp_path, n_handlers):
    options = lazy_orbax.LazyOptions(verify_snapshot=2)
    handlers = [lazy_orbax.standard_handler(options=options) for _ in range(n_handlers)]
    tree = {"x": on_mesh(np.arange(8.0), mesh, "a")}
    items = {"a": handlers[0], "b": handlers[-1]}
    with ocp.CheckpointManager(tmp_path, item_handlers=items) as manager:
        for step in range(6):
            args = {name: ocp.args.StandardSave(tree) for name in items}
            manager.save(step, args=ocp.args.Composite(**args))
            manager.wait_until_finished()
            join_threads("lazy_orbax-proof")
    assert verified(tmp_path) == [(2, "a"), (2, "b"), (4, "a"), (4, "b")]


def test_a_save_that_differed_is_followed_by_one_that_is_looked_at(mesh, tmp_path, monkeypatch):
    """Else what is wrong in every save would be told of one in a hundred."""
    tree = {"x": on_mesh(np.arange(8.0), mesh, "a")}
    handler = lazy_orbax.standard_handler()
    lazy_orbax.prewarm(handler, tree, directory=tmp_path)
    monkeypatch.setattr(Evidence, "differs", lambda *args: "it differs")
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for step in range(3):
            with pytest.raises(SaveError, match="it differs"):
                manager.save(step, args=ocp.args.StandardSave(tree))
                manager.wait_until_finished()
        assert manager.all_steps() == []
