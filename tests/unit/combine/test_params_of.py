"""`params_of`: whose parameters, in which dtype, and where they stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh
from flax import nnx
from flax.training.train_state import TrainState

import lazy_orbax
from lazy_orbax.errors import OptionError


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))


def params():
    return {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.arange(2)}


def test_those_of_a_train_state_and_of_a_dictionary():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.adam(1e-3))
    assert lazy_orbax.params_of(state) is state.params
    tree = {"params": params(), "opt_state": jnp.ones(2)}
    assert lazy_orbax.params_of(tree) is tree["params"]


@pytest.mark.parametrize("of", ["module", "optimizer", "state"])
def test_those_of_nnx_come_as_dictionaries(of):
    model = Model()
    if of == "module":
        found = lazy_orbax.params_of(model)
    elif of == "optimizer":
        found = lazy_orbax.params_of(nnx.ModelAndOptimizer(model, optax.adam(1e-3)))
    else:
        found = lazy_orbax.params_of(nnx.state(model))
    assert len(jax.tree.leaves(found)) == 4
    assert_same(found["layers"][1]["kernel"], model.layers[1].kernel[...])


def test_floats_are_cast_where_they_are(mesh):
    tree = {
        "w": on_mesh(np.arange(64, dtype=np.float32).reshape(8, 8), mesh, "a", "b"),
        "host": np.full(3, 1.5, np.float32),
        "half": jnp.ones(2, jnp.bfloat16),
        "n": jnp.arange(2),
    }
    found = lazy_orbax.params_of({"params": tree}, jnp.bfloat16)
    assert found["w"].sharding == tree["w"].sharding
    assert found["n"] is tree["n"]
    assert found["half"] is tree["half"]
    wanted = {name: tree[name].astype(jnp.bfloat16) for name in ("w", "host")}
    assert_same({name: found[name] for name in wanted}, wanted)


def test_a_scalar_of_numpy_is_cast_too():
    found = lazy_orbax.params_of({"params": {"scale": np.float32(1.5)}}, jnp.bfloat16)
    assert found["scale"].dtype == jnp.bfloat16


def test_a_cast_outlives_the_donation_of_what_it_was_made_of(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"params": params()}
    wanted = state["params"]["w"].astype(jnp.bfloat16)
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.standard_handler()) as manager:
        item = {"w": lazy_orbax.params_of(state, jnp.bfloat16)["w"]}
        manager.save(1, args=ocp.args.StandardSave(item))
        state = step(state)
    assert_same(lazy_orbax.load(tmp_path / "1")["w"], np.asarray(wanted))


@pytest.mark.parametrize("state", [{"w": 1}, {"params": {}}, 3, None, jnp.ones(2)])
def test_what_has_no_parameters_is_refused(state):
    with pytest.raises(OptionError, match=r"Found no parameters in a .*TrainState"):
        lazy_orbax.params_of(state)


@pytest.mark.parametrize(("dtype", "said"), [("int8", "none of floats"), ("what", "no dtype")])
def test_only_floats_are_cast_to(dtype, said):
    with pytest.raises(OptionError, match=said):
        lazy_orbax.params_of({"params": params()}, dtype)
