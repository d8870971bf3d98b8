"""A step in two halves: the same numbers, the state donated by the second half only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from equipment.gates import held_at
from equipment.training import pointers
from equipment.trees import assert_same, on_mesh
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import lazy_orbax


def loss_of(params, batch):
    # Small whole numbers: every order of adding them gives the same bits.
    error = batch @ params["w"] + params["b"]
    return jnp.sum(error), {"loss": jnp.max(error)}


def plain_state(mesh):
    rng = np.random.default_rng(0)
    w = rng.integers(-4, 5, (16, 8)).astype(np.float32)
    return {
        "params": {"w": on_mesh(w, mesh, "a", "b"), "b": on_mesh(w[0], mesh, "b")},
        "count": on_mesh(np.int32(0), mesh),
    }


def plain_gradients(state, batch):
    return jax.grad(loss_of, has_aux=True)(state["params"], batch)


def plain_update(state, grads):
    params = jax.tree.map(lambda p, g: p - 0.5 * g, state["params"], grads)
    return {"params": params, "count": state["count"] + 1}


def flax_state(mesh):
    params = plain_state(mesh)["params"]
    return TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.5, momentum=0.5))


def flax_gradients(state, batch):
    return jax.grad(loss_of, has_aux=True)(state.params, batch)


def flax_update(state, grads):
    return state.apply_gradients(grads=grads)


KINDS = {
    "plain": (plain_state, plain_gradients, plain_update),
    "flax": (flax_state, flax_gradients, flax_update),
}


@pytest.fixture
def batch(mesh):
    values = np.random.default_rng(1).integers(-3, 4, (8, 16)).astype(np.float32)
    return on_mesh(values, mesh, "a")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jitted", [False, True])
def test_the_numbers_are_those_of_one_program(mesh, batch, kind, jitted):
    make, gradients, update = KINDS[kind]

    def fused(state, batch):
        grads, aux = gradients(state, batch)
        return update(state, grads), aux

    halves = (jax.jit(gradients), jax.jit(update, donate_argnums=0))
    step = lazy_orbax.split_step(*(halves if jitted else (gradients, update)))
    state, wanted = make(mesh), make(mesh)
    for _ in range(3):
        state, aux = step(state, batch)
        wanted, wanted_aux = jax.jit(fused)(wanted, batch)
        assert_same((state, aux), (wanted, wanted_aux))


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_donates_and_the_gradients_do_not(mesh, batch, kind):
    make, gradients, update = KINDS[kind]
    seen = []

    def watched_update(state, grads):
        arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
        seen.append([array.is_deleted() for array in arrays])
        return jitted_update(state, grads)

    watched_update.lower = None  # Is used as it is.
    jitted_update = jax.jit(update, donate_argnums=0)
    state, _ = lazy_orbax.split_step(gradients, watched_update)(make(mesh), batch)
    assert len(seen) == 1
    assert len(seen[0]) >= 2
    assert not any(seen[0])

    step = lazy_orbax.split_step(gradients, update)
    state, _ = step(state, batch)
    before, given_away = pointers(state), state
    state, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given_away))
    assert pointers(state) == before


@pytest.mark.parametrize("mode", ["stage", "direct"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_between_steps_stores_the_state_of_its_moment(tmp_path, mesh, batch, kind, mode):
    make, gradients, update = KINDS[kind]
    step = lazy_orbax.split_step(gradients, update)
    state, lines = make(mesh), []
    options = lazy_orbax.LazyOptions(mode=mode, on_timeline=lines.append)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for i in range(3):
            state, _ = step(state, batch)
            wanted = jax.tree.map(jnp.copy, state)
            before = pointers(state)
            with held_at("to the host") as gate:
                manager.save(i, args=ocp.args.StandardSave(state))
                state, _ = step(state, batch)
                state, _ = step(state, batch)
                gate.opened.set()
                manager.wait_until_finished()
            assert pointers(state) == before
            found = manager.restore(i, args=ocp.args.StandardRestore(wanted))
            assert_same(found, wanted)
    assert [line.mode for line in lines] == [mode] * 3


def test_more_than_one_batch_argument():
    step = lazy_orbax.split_step(lambda w, x, y: (x * y, None), lambda w, g: w - g)
    assert step(jnp.ones(2), jnp.full(2, 3.0), jnp.full(2, 2.0))[0].tolist() == [-5.0, -5.0]


def test_sharded_gradients_keep_their_sharding(mesh, batch):
    state, _ = lazy_orbax.split_step(plain_gradients, plain_update)(plain_state(mesh), batch)
    assert state["params"]["w"].sharding.spec == P("a", "b")
