"""What a dead trainer left in memory becomes an ordinary step, which stock Orbax restores."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh

import lazy_orbax
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers.completing import complete, main
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.messages import asked


@pytest.fixture
def place():
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield str(above / "k")
    # It may have ended.
    with contextlib.suppress(FileNotFoundError), connected(str(above / "k")) as peer:
        asked(peer, {"do": "stop", "discard": True}, timeout_s=60)
    shutil.rmtree(above)


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    with ocp.CheckpointManager(run) as manager:
        manager.save(10, args=ocp.args.StandardSave(state(10)))
    return run


def state(step, put=lambda array: array):
    return {
        "w": put(np.arange(64, dtype=np.float32).reshape(8, 8) + step),
        "layers": [{"b": np.full(3, step, np.int16)}, {"b": np.zeros(2)}],
        "n": step,
        "key": jax.random.key(step),
    }


def keep(run, place, step, tree, **keywords):
    """A trainer that keeps a step and dies, as far as the keeper can see."""
    keeper = lazy_orbax.Keeper(run, directory=place, **keywords)
    assert keeper.save(step, tree)
    keeper.wait()
    assert keeper.report.newest_step == step
    keeper.close(discard=False)


def test_stock_orbax_restores_what_was_completed(run, place, mesh):
    keep(run, place, 20, state(20, lambda array: on_mesh(array, mesh, "a", "b")))
    assert main([str(run), place]) == 0
    with ocp.CheckpointManager(run, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == [10, 20]
        like = state(0, lambda array: on_mesh(array, mesh, "b", "a"))
        found = stock.restore(20, args=ocp.args.StandardRestore(like))
        assert_same(found, state(20))
        assert found["w"].sharding == like["w"].sharding
        assert isinstance(stock.restore(20)["w"], np.ndarray)  # It depends on no device.
    assert lazy_orbax.verify(run / "20").is_whole


def test_a_run_with_which_somebody_went_on_is_left_alone(run, place):
    keep(run, place, 20, state(20))
    with ocp.CheckpointManager(run) as manager:
        manager.save(15, args=ocp.args.StandardSave(state(15)), force=True)
    with pytest.raises(KeeperError, match=r"15 is newer"):
        complete(str(run), place)
    assert not (run / "20").exists()


def test_what_is_older_than_storage_is_not_written(run, place):
    keep(run, place, 5, state(5))
    assert main([str(run), place]) == 1
    assert sorted(path.name for path in run.iterdir()) == ["10"]


def test_a_flipped_bit_makes_the_one_before_count(run, place):
    keeper = lazy_orbax.Keeper(run, directory=place)
    for step in (20, 30):
        keeper.save(step, state(step))
        keeper.wait()
    for _, snapshot in keeper.slots.shelf.snapshots():
        if snapshot.step == 30:
            with open(snapshot.path, "r+b") as file:
                file.seek(4096)
                file.write(b"\x77")
    keeper.close(discard=False)
    assert complete(str(run), place) == 20


def test_the_step_is_named_as_the_others_are(tmp_path, place):
    """Its manager would not find it otherwise."""
    run = tmp_path / "named"
    options = ocp.CheckpointManagerOptions(step_prefix="my_step", step_format_fixed_length=6)
    with ocp.CheckpointManager(run, options=options) as manager:
        manager.save(10, args=ocp.args.StandardSave({"a": jnp.ones(3)}))
    keep(run, place, 20, {"a": jnp.ones(3) * 2})
    assert complete(str(run), place) == 20
    assert sorted(os.listdir(run)) == ["my_step_000010", "my_step_000020"]


def test_all_items_or_none(run, place):
    keeper = lazy_orbax.Keeper(run, directory=place)
    for step, items in ((20, ("x", "y")), (30, ("x",))):
        for item in items:
            keeper.save(step, {"a": jnp.ones(3) * step}, item=item)
            keeper.wait()
    keeper.close(discard=False)
    assert complete(str(run), place) == 20
    assert {"x", "y"} <= set(os.listdir(run / "20"))


def test_a_run_that_is_not_there_is_not_made(tmp_path, place):
    keep(tmp_path / "gone", place, 1, state(1))
    with pytest.raises(KeeperError, match="gone"):
        complete(str(tmp_path / "gone"), place)
    assert not (tmp_path / "gone").exists()


def test_without_a_snapshot_it_says_so(run, place):
    with pytest.raises(KeeperError, match="no snapshot"):
        complete(str(run), place)


def test_the_keeper_completes_the_run_when_its_trainer_has_died(run, place):
    keeper = lazy_orbax.Keeper(run, directory=place, complete_after_s=0.0)
    keeper.save(20, state(20))
    keeper.wait()
    with connected(place) as peer:  # Another run has a trainer: the keeper stays.
        asked(peer, {"do": "hello", "run": "other", "process": 0, "pid": 0}, timeout_s=60)
        keeper._link.close()  # Without a word, as at the end of a process.
        log = pathlib.Path(place, "keeper.log")
        while "Completing" not in log.read_text():
            time.sleep(0.1)
        assert f"Completing {run} ended with 0" in log.read_text()
    with ocp.CheckpointManager(run) as manager:
        args = ocp.args.StandardRestore(state(0))
        assert_same(manager.restore(20, args=args), state(20))
