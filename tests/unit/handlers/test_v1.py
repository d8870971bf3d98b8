"""What is made for Orbax v1, and what where this Orbax is not known."""

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax._orbax import v1 as inside
from lazy_orbax.errors import OptionError, StockFallbackWarning
from lazy_orbax.handlers.v1 import lazy_v1, v1_registry


def saved(directory):
    """Saves with v1. Returns whether lazily."""
    v1.save(directory, {"a": jnp.arange(3)})
    return (directory / "state" / "lazy_orbax_digests").exists()


def test_saves_are_lazy_until_that_is_undone(tmp_path):
    assert not saved(tmp_path / "1")
    undo = lazy_v1()
    assert saved(tmp_path / "2")
    undo()
    undo()
    assert not saved(tmp_path / "3")


@pytest.mark.parametrize("call", [lazy_v1, v1_registry])
def test_options_are_checked(call):
    with pytest.raises(OptionError, match="is not a lazy_orbax.LazyOptions"):
        call(options={"mode": "stage"})


@pytest.mark.parametrize("call", [lazy_v1, v1_registry])
def test_an_orbax_that_is_not_known_saves_the_stock_way_and_says_so_once(
    tmp_path, monkeypatch, call
):
    monkeypatch.setattr(inside, "MISSING", ["orbax.checkpoint.v1._src.somewhere.PyTreeHandler"])
    with pytest.warns(StockFallbackWarning, match=r"somewhere\.PyTreeHandler") as warned:
        found = call()
    assert len(warned) == 1
    context = v1.Context()
    if call is v1_registry:
        context.checkpointables.registry = found
    with context:
        assert not saved(tmp_path / "1")
    if call is lazy_v1:
        found()


def test_limits_of_the_context_are_kept(tmp_path):
    timelines = []
    undo = lazy_v1(lazy_orbax.LazyOptions(on_timeline=timelines.append))
    context = v1.Context()
    context.memory.write_concurrent_bytes = 2**22
    context.memory.transfer_concurrent_bytes = 2**21
    context.memory.read_concurrent_bytes = 2**23
    with context:
        v1.save(tmp_path / "1", {"a": jnp.ones((2**11, 2**9))})  # Twice as large.
        assert v1.load(tmp_path / "1", {"a": jnp.ones((2**11, 2**9))})["a"].shape == (2**11, 2**9)
    undo()
    assert timelines[0].committed_s is not None


def test_a_registry_takes_more_handlers(tmp_path):
    registry = v1_registry()
    names = [name for _, name in registry.get_all_entries()]
    stock = [name for _, name in v1.handlers.global_registry().get_all_entries()]
    assert names == stock
    registry.add(v1.handlers.JsonHandler, checkpointable_name="settings")
    context = v1.Context()
    context.checkpointables.registry = registry
    with context:
        v1.save_checkpointables(tmp_path / "1", {"settings": {"a": 1}, "state": {"a": 1}})
        assert v1.load_checkpointables(tmp_path / "1")["settings"] == {"a": 1}
