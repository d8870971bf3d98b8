"""Which manager gets its steps back after a failure: the registered one, else the caller."""

import inspect
import types

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from equipment.gates import failing_at, within

import lazy_orbax
from lazy_orbax._orbax import lifecycle
from lazy_orbax.errors import SaveError

STATE = {"w": jnp.arange(8)}


def save(manager, step):
    within(manager.save, step, args=ocp.args.StandardSave(STATE))
    within(manager.wait_until_finished)


def manager_of(run):
    """Returns a manager, and a list that grows whenever the manager lists its steps anew."""
    manager = ocp.CheckpointManager(run, item_handlers=lazy_orbax.standard_handler())
    reload, reloads = manager.reload, []

    def counted():
        reloads.append(1)
        reload()

    manager.reload = counted
    return manager, reloads


@pytest.fixture
def frames(monkeypatch):
    """How often somebody looked at the frames of callers."""
    looked = []

    def currentframe():
        looked.append(1)
        return inspect.currentframe().f_back

    monkeypatch.setattr(lifecycle, "inspect", types.SimpleNamespace(currentframe=currentframe))
    return looked


@pytest.mark.parametrize("is_registered", [True, False])
def test_a_registered_manager_is_found_without_a_look_at_frames(tmp_path, frames, is_registered):
    manager, reloads = manager_of(tmp_path / "run")
    with manager:
        failed = lazy_orbax.log_failed_saves(manager) if is_registered else None
        with failing_at("finish"):
            if failed is not None:
                save(manager, 1)
                assert failed.count == 1
            else:
                with pytest.raises(SaveError):
                    save(manager, 1)
        reloads.clear()
        save(manager, 2)
        assert reloads
        assert bool(frames) is not is_registered


def test_a_manager_that_was_closed_is_not_taken_for_the_next_of_its_run(tmp_path, frames):
    closed, closed_reloads = manager_of(tmp_path / "run")
    lazy_orbax.log_failed_saves(closed)
    closed.close()
    manager, reloads = manager_of(tmp_path / "run")
    with manager:
        with failing_at("finish"), pytest.raises(SaveError):
            save(manager, 1)
        closed_reloads.clear()
        reloads.clear()
        save(manager, 2)
        assert reloads
        assert frames
        assert not closed_reloads
