"""The newest whole snapshot becomes a step of a tier: an ordinary one, and never a part of one."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh

import lazy_orbax
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers import promoting
from lazy_orbax.handlers.promoting import main, promote
from lazy_orbax.tiers import shelf
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.kept_steps import KeptStep
from lazy_orbax.tiers.messages import asked
from lazy_orbax.tiers.promotion import Promotions
from lazy_orbax.tiers.shelf import claim_of
from lazy_orbax.tiers.tier import told_of

RUN = "/run"


@pytest.fixture(scope="module")
def place():
    """A directory in which a keeper stays, with a trainer of another run."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    with lazy_orbax.Keeper("/another", directory=str(above / "k")):
        yield str(above / "k")
    assert os.listdir(above) == []
    shutil.rmtree(above)


@pytest.fixture
def keeper(place):
    with lazy_orbax.Keeper(RUN, directory=place) as keeper:
        yield keeper


@pytest.fixture
def tier(tmp_path):
    return lazy_orbax.Tier(tmp_path / "tier", every_s=60, keep=2)


def state(step, put=lambda array: array):
    return {
        "w": put(np.arange(64, dtype=np.float32).reshape(8, 8) + step),
        "layers": [{"b": np.full(3, step, np.int16)}, {"b": np.zeros(2)}],
        "n": step,
        "key": jax.random.key(step),
    }


def keep(keeper, step, tree=None):
    assert keeper.save(step, tree or state(step))
    keeper.wait()
    assert keeper.report.newest_step == step


def steps(tier):
    with ocp.CheckpointManager(tier.path) as manager:
        return list(manager.all_steps())


def test_stock_orbax_restores_what_was_promoted(keeper, place, tier, mesh):
    keep(keeper, 20, state(20, lambda array: on_mesh(array, mesh, "a", "b")))
    assert main([RUN, place, json.dumps(told_of([tier])[0])]) == 0
    assert promote(RUN, tier, place) is None  # Nothing is newer.
    with ocp.CheckpointManager(tier.path, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == [20]
        like = state(0, lambda array: on_mesh(array, mesh, "b", "a"))
        found = stock.restore(20, args=ocp.args.StandardRestore(like))
        assert_same(found, state(20))
        assert found["w"].sharding == like["w"].sharding
        # A manager may work in the same directory: its steps are never removed.
        stock.save(25, args=ocp.args.StandardSave(state(25)))
        stock.wait_until_finished()
    assert lazy_orbax.verify(f"{tier.path}/20").is_whole
    for step in (30, 40):
        keep(keeper, step)
        assert promote(RUN, tier, place) == step
    assert steps(tier) == [25, 30, 40]


def test_several_items_become_one_step(keeper, place, tier):
    for item in ("x", "y"):
        keeper.save(5, {"a": np.full(3, len(item))}, item=item)
        keeper.wait()
    assert promote(RUN, tier, place) == 5
    assert {"x", "y"} <= set(os.listdir(f"{tier.path}/5"))


def test_what_a_killed_promotion_left_goes_when_the_next_one_has_a_newer_step(keeper, place, tier):
    keep(keeper, 20)
    promote(RUN, tier, place)
    os.rename(f"{tier.path}/20", f"{tier.path}/20.orbax-checkpoint-tmp")
    keep(keeper, 30)
    assert promote(RUN, tier, place) == 30
    assert os.listdir(tier.path) == ["30"]


def test_a_trainer_writes_over_nothing_that_is_being_read(keeper, place, tier, monkeypatch):
    keep(keeper, 20)
    read = KeptStep.values

    def slowly(kept):
        keep(keeper, 30)
        keeper.save(40, state(40))  # In the place of what is being read.
        keeper.wait()
        return read(kept)

    with monkeypatch.context() as patched:
        patched.setattr(KeptStep, "values", slowly)
        assert promote(RUN, tier, place) == 20
    assert (keeper.report.newest_step, keeper.report.skipped) == (30, 1)
    assert promote(RUN, tier, place) == 30
    assert steps(tier) == [20, 30]


def test_where_the_newest_is_broken_an_older_one_may_be_written_over(
    keeper, place, tier, monkeypatch
):
    keep(keeper, 20)
    keep(keeper, 30)
    check = KeptStep.refuse_parts

    def slowly(kept):
        monkeypatch.setattr(KeptStep, "refuse_parts", check)
        keep(keeper, 40)
        raise KeeperError("as if it were")

    monkeypatch.setattr(KeptStep, "refuse_parts", slowly)
    with pytest.raises(KeeperError, match="step 20: .* was written over meanwhile"):
        promote(RUN, tier, place)
    assert promote(RUN, tier, place) == 40


def test_a_part_of_a_pods_step_is_not_listed(keeper, place, tier, monkeypatch):
    read = shelf.read_snapshot

    def of_two(path):
        found = read(path)
        return dataclasses.replace(found, facts={**found.facts, "processes": 2})

    monkeypatch.setattr(shelf, "read_snapshot", of_two)
    monkeypatch.setattr(KeptStep, "refuse_other", lambda kept: None)
    keep(keeper, 20)
    with pytest.raises(KeeperError, match="process 1"):
        promote(RUN, tier, place)
    assert steps(tier) == []
    monkeypatch.setattr(jax, "process_index", lambda *_: 1)
    with lazy_orbax.Keeper(RUN, directory=place) as other:
        other.slots.life = keeper.slots.life
        keep(other, 20)
        monkeypatch.setattr(jax, "process_index", lambda *_: 0)
        assert promote(RUN, tier, place) == 20
        monkeypatch.setattr(jax, "process_index", lambda *_: 1)
    assert steps(tier) == [20]


def test_a_flipped_bit_in_memory_is_never_listed(keeper, place, tier):
    keep(keeper, 20)
    keep(keeper, 30)
    for _, snapshot in keeper.slots.shelf.snapshots():
        if snapshot.step == 30:
            with open(snapshot.path, "r+b") as file:
                file.seek(4096)
                file.write(b"\x77")
    assert promote(RUN, tier, place) == 20
    with pytest.raises(KeeperError, match="(?s)step 30: .* not those that were kept"):
        promote(RUN, tier, place)
    assert steps(tier) == [20]


def test_without_a_snapshot_it_says_so(keeper, place, tier):
    with pytest.raises(KeeperError, match="no snapshot of /run"):
        promote(RUN, tier, place)


def test_a_tier_that_cannot_be_written_is_told_of(keeper, place, tier, caplog):
    keep(keeper, 20)
    pathlib.Path(tier.path).write_text("no directory")
    assert main([RUN, place, json.dumps(told_of([tier])[0])]) == 1
    assert f"Nothing of {RUN} was brought to {tier.path}" in caplog.text


def test_a_tier_that_has_a_newer_step_gets_nothing_and_that_is_said(keeper, place, tier, caplog):
    keep(keeper, 20)
    assert promote(RUN, tier, place) == 20
    assert promote(RUN, tier, place) is None
    assert "is not brought" not in caplog.text
    keep(keeper, 6)  # The job went back.
    assert promote(RUN, tier, place) is None
    assert f"Step 6 of {RUN} is not brought to {tier.path}, which has step 20. Remov" in caplog.text
    shutil.rmtree(f"{tier.path}/20")
    assert promote(RUN, tier, place) == 6


def test_two_programs_do_not_write_one_tier(keeper, place, tier):
    """The keeper of the first one has died, say."""
    keep(keeper, 20)
    lock = f"{place}/{claim_of(f'tier {tier.path}', 0)}"
    holds = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    holds += "print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holds, lock], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(KeeperError, match="another program"):
            promote(RUN, tier, place)
    assert not os.path.exists(tier.path)
    assert promote(RUN, tier, place) == 20


def test_what_the_keeper_starts_brings_it_there(keeper, place, tier, monkeypatch):
    keep(keeper, 20)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    promotions = Promotions(keeper.slots.shelf)
    promotions.came(RUN, told_of([tier]), 0.0)
    promotions.turn(tier.every_s, {RUN})
    ((python, dash_m, module, *arguments),) = started
    assert [python, dash_m, module] == [sys.executable, "-m", promoting.__name__]
    assert main(arguments) == 0
    assert steps(tier) == [20]


@pytest.mark.slow  # The program makes way for everybody: it may take its time.
def test_the_keeper_brings_it_there_while_the_trainer_goes_on(place, tier):
    tier = dataclasses.replace(tier, every_s=0.1)
    with lazy_orbax.Keeper(RUN, directory=place, tiers=[tier]) as keeper:
        keep(keeper, 20)
        with connected(place) as peer:
            while asked(peer, {"do": "status"}, timeout_s=60)["tiers"][0]["status"] != 0:
                time.sleep(0.05)
        assert steps(tier) == [20]


def test_one_process_that_leaves_stops_nothing_for_the_others(place, tier):
    told = {"run": RUN, "pid": 0, "tiers": told_of([tier])}
    with connected(place) as one:
        asked(one, {"do": "hello", "process": 0, **told}, timeout_s=60)
        with connected(place) as other:
            asked(other, {"do": "hello", "process": 1, **told}, timeout_s=60)
            asked(other, {"do": "leave", "discard": []}, timeout_s=60)
            assert asked(one, {"do": "status"}, timeout_s=60)["tiers"]
            asked(one, {"do": "leave", "discard": []}, timeout_s=60)
            assert not asked(one, {"do": "status"}, timeout_s=60)["tiers"]
