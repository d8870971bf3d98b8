"""Errors planted in the package: a save that is verified fails, and is not committed."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same
from faults import planted
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity import proof_subjects
from lazy_orbax.save.plan_cache import PLAN_CACHE
from lazy_orbax.snapshot import pack, programs

NAMES = {"one", "two", "shared", "small", "host", "host2"}


@pytest.fixture(autouse=True)
def fresh_programs():
    """Programs with an error in them serve no other test."""
    forget_programs()
    yield
    forget_programs()


def forget_programs():
    """Forgets the plans, with which programs are kept, and what of programs is kept without."""
    PLAN_CACHE.clear()
    programs.PROGRAMS.clear()
    pack._cached_table.cache_clear()


def state_of(mesh, step):
    rng = np.random.default_rng(step)

    def on(shape, dtype, *spec):
        host = rng.standard_normal(shape).astype(dtype)
        return jax.device_put(host, NamedSharding(mesh, P(*spec)))

    return {
        "one": on((16, 16), np.float32, "a"),
        "two": on((16, 16), np.float32, "a"),
        "shared": on((16, 8), np.float32, None, "b"),
        "small": on((16, 4), jnp.bfloat16, "a"),
        "host": rng.integers(0, 99, (4,)),
        "host2": rng.integers(100, 199, (4,)),
    }


def save_two(directory, mesh, every):
    """Saves two steps; returns what failed, and the steps that are there."""
    handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(verify_snapshot=every))
    failures = []
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        for step in range(2):
            try:
                manager.save(step, args=ocp.args.StandardSave(state_of(mesh, step)))
                manager.wait_until_finished()
            except SaveError as error:
                failures.append((step, error))
        steps = manager.all_steps()
    with ocp.CheckpointManager(directory) as manager:
        assert manager.all_steps() == steps
    return failures, steps


ALL = [*planted.BLIND, *planted.OTHERS]
# Both find fingerprints of the same arrays; what differs is who reads those.
CASES = [
    *[pytest.param(plant, "the host", id=plant.__name__) for plant in ALL],
    *[
        pytest.param(
            plant,
            "programs",
            id=f"{plant.__name__}, by programs",
            marks=[pytest.mark.slow] * (i > 3),
        )
        for i, plant in enumerate(ALL)
    ],
]


@pytest.mark.parametrize(("plant", "by"), CASES)
def test_a_verified_save_fails_and_names_the_leaf(plant, by, tmp_path, mesh, monkeypatch):
    if by == "programs":  # As on an accelerator.
        monkeypatch.setattr(proof_subjects, "is_in_host_memory", lambda sharding: False)
    plant(monkeypatch)
    failures, steps = save_two(tmp_path / "run", mesh, every=1)
    assert failures
    assert not {step for step, _ in failures} & set(steps)
    for _, error in failures:
        assert error.leaf in NAMES
        assert "fingerprint" in error.what or "cover" in error.what
    # All that is committed is right.
    monkeypatch.undo()
    for step in steps:
        state = state_of(mesh, step)
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            assert_same(manager.restore(step, args=ocp.args.StandardRestore(state)), state)


@pytest.mark.parametrize("plant", planted.BLIND, ids=lambda f: f.__name__)
def test_digests_alone_see_nothing(plant, tmp_path, mesh, monkeypatch):
    """What the test above would show if fingerprints were not there."""
    plant(monkeypatch)
    failures, steps = save_two(tmp_path / "run", mesh, every=0)
    monkeypatch.undo()
    assert (failures, steps) == ([], [0, 1])
    report = lazy_orbax.verify(tmp_path / "run")
    assert report.is_whole
    wrong = 0
    for step in steps:
        state = state_of(mesh, step)
        handler = lazy_orbax.standard_handler()
        with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
            found = manager.restore(step, args=ocp.args.StandardRestore(state))
        wrong += any(
            np.array(found[name]).tobytes() != np.array(state[name]).tobytes() for name in state
        )
    assert wrong


@pytest.mark.parametrize("by", ["the host", "programs"])
def test_without_an_error_every_save_is_committed(by, tmp_path, mesh, monkeypatch):
    if by == "programs":
        monkeypatch.setattr(proof_subjects, "is_in_host_memory", lambda sharding: False)
    assert save_two(tmp_path / "run", mesh, every=1) == ([], [0, 1])
