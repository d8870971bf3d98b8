"""The promise: when `save()` returned, the arrays may be donated, deleted, dropped or changed."""

from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import held_at, within
from equipment.training import SLAB_BYTES, Steps, cached_on_host, make_state, pointers
from equipment.trees import assert_same

import lazy_orbax
from lazy_orbax.snapshot import device_to_host

MODES = ("stage", "direct", "auto")
# Where a save may be held while the state is donated.
_PLACES = [None, "to the host", "open", "views", "hand over", "wait", "finish"]


def manager_of(path, mode, **options):
    options = lazy_orbax.LazyOptions(mode=mode, slab_bytes=SLAB_BYTES, **options)
    return ocp.CheckpointManager(
        path,
        item_handlers=lazy_orbax.standard_handler(options=options),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    )


def stored(path, step):
    """What a stock manager restores, onto the devices it was saved from."""
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(path, item_handlers=handler) as manager:
        assert manager.latest_step() == step
        return manager.restore(step)


@pytest.fixture(params=["cpu", "accelerator"])
def memory(request, monkeypatch):
    """Whether what is staged is in host memory already, or has to be fetched as from a GPU."""
    if request.param == "accelerator":
        monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    return request.param


@pytest.mark.parametrize(
    "mode", ["auto", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[:2])]
)
def test_fifty_saves_survive_donation_at_random_times(tmp_path, mesh, mode, copying_first):
    state = make_state(mesh)
    steps = Steps(state)
    rng = np.random.default_rng(MODES.index(mode))
    with manager_of(tmp_path, mode) as manager, ocp.StandardCheckpointer() as stock:
        for step in range(50):
            wanted = steps.bytes_of(state)
            place = _PLACES[rng.integers(len(_PLACES))]
            open_after = int(rng.integers(0, 3))
            with held_at(place) as gate:
                manager.save(step, args=ocp.args.StandardSave(state))
                for donation in range(2):
                    if donation == open_after:
                        gate.opened.set()
                    steps.compute(int(rng.integers(0, 40)) if rng.random() < 0.5 else 0)
                    state = steps.donating(state)
                gate.opened.set()
                manager.wait_until_finished()
            assert_same(stock.restore(tmp_path / str(step) / "default"), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_donation_still_aliases_every_buffer(tmp_path, mesh, mode, memory):
    state = make_state(mesh)
    steps = Steps(state)
    state = steps.donating(state)
    before = pointers(state)
    state = steps.donating(state)
    without_save = {path: found == before[path] for path, found in pointers(state).items()}
    assert all(without_save.values()), without_save

    with manager_of(tmp_path, mode) as manager:
        for step in range(3):
            before = pointers(state)
            for place in ("to the host", "finish"):
                with held_at(place) as gate:
                    manager.save(10 * step + len(place), args=ocp.args.StandardSave(state))
                    assert cached_on_host(state) == []
                    state = steps.donating(state)
                    assert pointers(state) == before
                    state = steps.donating(state)
                    assert pointers(state) == before
                    gate.opened.set()
                    manager.wait_until_finished()
                assert pointers(state) == before
                assert cached_on_host(state) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["to the host", "views", "finish"])
def test_the_state_may_be_dropped_or_deleted(tmp_path, mesh, mode, memory, place):
    with manager_of(tmp_path, mode) as manager:
        for step, end in enumerate(("drop", "delete")):
            state = make_state(mesh, seed=step)
            wanted = Steps(state).bytes_of(state)
            with held_at(place) as gate:
                manager.save(step, args=ocp.args.StandardSave(state))
                if end == "delete":
                    for leaf in jax.tree.leaves(state):
                        leaf.delete()
                del state
                gate.opened.set()
                manager.wait_until_finished()
            assert_same(stored(tmp_path, step), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_the_state_is_donated_while_save_waits_for_memory_to_be_written(
    tmp_path, mesh, mode, memory
):
    """A budget smaller than the state: the part of it that was written is reused at once."""
    state = make_state(mesh)
    steps = Steps(state)
    with manager_of(tmp_path, mode, host_bytes=SLAB_BYTES) as manager:
        for step in range(5):
            wanted = steps.bytes_of(state)
            within(manager.save, step, args=ocp.args.StandardSave(state))
            state = steps.donating(state)
            state = steps.donating(state)
            within(manager.wait_until_finished)
            assert_same(stored(tmp_path, step), wanted)


@pytest.mark.parametrize("place", ["to the host", "views", "hand over", "finish"])
def test_numpy_leaves_may_be_changed_in_place(tmp_path, place):
    state = {
        "large": np.arange(2**19, dtype=np.float64),
        "small": np.arange(5, dtype=np.int16),
        "view": np.arange(64, dtype=np.float32).reshape(8, 8).T[::2],
        "0d": np.array(3.5, dtype=np.float32),
    }
    wanted = jax.tree.map(np.array, state)
    with manager_of(tmp_path, "auto") as manager, held_at(place) as gate:
        manager.save(1, args=ocp.args.StandardSave(state))
        for leaf in state.values():
            leaf[...] = 0
        gate.opened.set()
        manager.wait_until_finished()
    assert_same(stored(tmp_path, 1), wanted)


def test_containers_may_be_changed_in_place(tmp_path, mesh):
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    notes = {"epoch": 3, "seen": ["a"]}
    with manager_of(tmp_path, "auto") as manager:
        with held_at("finish") as gate:
            manager.save(1, args=ocp.args.StandardSave(state, custom_metadata=notes))
            notes["seen"].append("b")
            notes["epoch"] = object()
            state["small"].clear()
            del state["large"]
            gate.opened.set()
            manager.wait_until_finished()
        assert_same(stored(tmp_path, 1), wanted)
        assert manager.item_metadata(1).custom_metadata == {"epoch": 3, "seen": ["a"]}
