"""The futures that a handler hands to Orbax, and the handler's own end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import orbax.checkpoint as ocp
import pytest
from equipment.gates import Boom, await_budget, failing_at, held_at, join_threads, within
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import assert_same
from etils import epath

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

PLACES = ["to the host", "views", "wait", "finish"]


@pytest.fixture
def handler():
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES)
    return lazy_orbax.LazyCheckpointHandler(options=options)


def start(handler, path, state):
    """Saves without any checkpointer. Returns the futures."""
    path.mkdir()
    arguments = lazy_orbax.args.LazySave(state)
    return asyncio.run(handler.async_save(epath.Path(path), args=arguments))


@pytest.mark.parametrize("place", PLACES)
def test_result_honours_its_timeout(tmp_path, mesh, handler, place):
    state = make_state(mesh)
    with held_at(place) as gate:
        (future,) = start(handler, tmp_path / "a", state)
        gate.await_call()
        for timeout_s in (0, 0.05):
            with pytest.raises(TimeoutError):
                within(future.result, timeout=timeout_s)
        gate.opened.set()
        within(future.result, timeout=30)
    within(future.result)
    within(handler.finalize, epath.Path(tmp_path / "a"))
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "a"), Steps(state).bytes_of(state))
    within(handler.close)


@pytest.mark.parametrize("place", PLACES)
def test_cancel_ends_the_save_and_returns_its_memory(tmp_path, mesh, handler, place):
    state = make_state(mesh)
    with held_at(place) as gate:
        (future,) = start(handler, tmp_path / "a", state)
        gate.await_call()
        future.cancel()
        future.cancel()
        gate.opened.set()
        with pytest.raises(concurrent.futures.CancelledError):
            within(future.result, timeout=30)
    join_threads("lazy_orbax")
    await_budget()
    if place != "finish":
        assert not (tmp_path / "a" / "_METADATA").exists()
    (future,) = start(handler, tmp_path / "b", state)
    within(future.result)
    within(handler.close)


def test_cancel_after_the_end_changes_nothing(tmp_path, mesh, handler):
    state = make_state(mesh)
    (future,) = start(handler, tmp_path / "a", state)
    within(future.result)
    future.cancel()
    within(handler.finalize, epath.Path(tmp_path / "a"))
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "a"), Steps(state).bytes_of(state))
    within(handler.close)


def test_the_same_error_is_raised_by_every_call_of_result(tmp_path, mesh, handler):
    with failing_at("finish"):
        (future,) = start(handler, tmp_path / "a", make_state(mesh))
        for _ in range(2):
            with pytest.raises(SaveError) as caught:
                within(future.result)
            assert isinstance(caught.value.__cause__, Boom)
    # It was told: close() does not tell it again.
    within(handler.close)


@pytest.mark.parametrize("place", PLACES)
def test_close_waits(tmp_path, mesh, handler, place):
    with held_at(place) as gate:
        start(handler, tmp_path / "a", make_state(mesh))
        gate.await_call()
        closer = threading.Thread(target=handler.close, daemon=True)
        closer.start()
        closer.join(0.1)
        assert closer.is_alive()
        gate.opened.set()
        closer.join(30)
        assert not closer.is_alive()
    assert HOST_BUDGET.in_flight_bytes == 0
    assert (tmp_path / "a" / "_METADATA").exists()
    within(handler.close)


def test_close_waits_for_every_save_although_they_fail(tmp_path, mesh, handler):
    state = make_state(mesh)
    with failing_at("finish"), held_at("finish") as gate:
        for name in ("a", "b"):
            start(handler, tmp_path / name, state)
        gate.await_call()
        gate.opened.set()
        with pytest.raises(SaveError, match="no luck at finish"):
            within(handler.close)
    alive = [thread.name for thread in threading.enumerate()]
    assert [name for name in alive if name.startswith("lazy_orbax")] == []
    assert HOST_BUDGET.in_flight_bytes == 0
    within(handler.close)


def test_wait_until_staged_has_a_timeout(tmp_path, mesh, handler, monkeypatch):
    # As on an accelerator: what is staged is not in host memory yet.
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    with held_at("to the host") as gate:
        (future,) = start(handler, tmp_path / "a", make_state(mesh))
        with pytest.raises(TimeoutError, match=r"a was not staged within 0\.02 s"):
            within(lazy_orbax.wait_until_staged, 0.02)
        gate.opened.set()
        within(lazy_orbax.wait_until_staged, 30)
        within(future.result)
    within(handler.close)
