"""What the first save finds already done."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.errors import OptionError, TreeError
from lazy_orbax.save.plan_cache import PLAN_CACHE, PlanCache
from lazy_orbax.snapshot import pack, programs
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def forget():
    PLAN_CACHE.clear()
    programs.PROGRAMS.clear()
    pack._cached_table.cache_clear()
    HOST_BUDGET.drop_idle()
    yield
    HOST_BUDGET.drop_idle()


@pytest.fixture
def compiled():
    """Counts the programs that are compiled."""
    found = []

    def listen(event, duration_s, **_):
        if event == COMPILED:
            found.append(duration_s)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def make_state(mesh):
    params = {
        "w": on_mesh(np.ones((16, 64), np.float32), mesh, "a", "b"),
        "norm": on_mesh(np.ones((64,), np.float32), mesh),
        "b": on_mesh(np.ones((16, 8), jnp.bfloat16), mesh, None, "b"),
        "q": on_mesh(np.ones((16, 8), jnp.int4), mesh, "a"),
    }
    step = jax.jit(lambda p: (jax.tree.map(lambda x: x * 1, p), optax.adam(1e-3).init(p)))
    params, moments = step(params)
    key = jax.device_put(jax.random.key(3, impl="rbg"), NamedSharding(mesh, P()))
    return {
        "params": params,
        "moments": moments,
        "key": key,
        "scale": jax.device_put(1.0, NamedSharding(mesh, P())),  # Weakly typed.
        "host": np.arange(3),
        "epoch": 3,
        "none": None,
    }


def abstract_of(state):
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=x.sharding, weak_type=getattr(x, "weak_type", False)
            )
            if isinstance(x, jax.Array)
            else x
        ),
        state,
    )


FACES = {
    "standard": (lazy_orbax.standard_handler, ocp.args.StandardSave),
    "pytree": (lazy_orbax.pytree_handler, ocp.args.PyTreeSave),
    "lazy": (lazy_orbax.LazyCheckpointHandler, lazy_orbax.args.LazySave),
}


@pytest.mark.parametrize("face", FACES)
def test_the_first_save_plans_compiles_and_allocates_nothing(
    tmp_path, mesh, face, compiled, monkeypatch
):
    make, save_args = FACES[face]
    state, handler = make_state(mesh), make()
    lazy_orbax.prewarm(handler, abstract_of(state))
    assert compiled
    compiled.clear()
    assert HOST_BUDGET.in_flight_bytes == 0
    warmed_bytes = HOST_BUDGET.idle_bytes
    assert warmed_bytes > 0
    added = []
    monkeypatch.setattr(PlanCache, "add", lambda self, *entry: added.append(entry))
    fresh = []
    monkeypatch.setattr(pack.Buffer, "fresh", lambda self: fresh.append(self))
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(1, args=save_args(state))
        assert (added, fresh, compiled) == ([], [], [])
        manager.wait_until_finished()
        assert HOST_BUDGET.idle_bytes == warmed_bytes
    found = ocp.StandardCheckpointer().restore(tmp_path / "1" / "default", abstract_of(state))
    assert_same(found, state)


def test_nothing_is_kept_that_only_a_rehearsal_needs(mesh):
    module = importlib.import_module("lazy_orbax.handlers.prewarm")
    lazy_orbax.prewarm(lazy_orbax.standard_handler(), abstract_of(make_state(mesh)))
    assert module._zeros.cache_info().currsize == module._like.cache_info().currsize == 0


def test_a_rehearsal_that_fails_gives_back_what_it_took(mesh, monkeypatch):
    """Else the next save would wait for that memory, without end."""
    module, taken = importlib.import_module("lazy_orbax.handlers.prewarm"), []
    original = module.device_to_host.take

    def take(*args):
        if taken:
            raise RuntimeError("out of memory")
        taken.append(HOST_BUDGET.in_flight_bytes)
        return original(*args)

    monkeypatch.setattr(module.device_to_host, "take", take)
    options = lazy_orbax.LazyOptions(slab_bytes=2**20)
    large = {name: on_mesh(np.ones((2**10, 2**8), np.float32), mesh, "a") for name in "xy"}
    with pytest.raises(RuntimeError, match="out of memory"):
        lazy_orbax.prewarm(lazy_orbax.standard_handler(options=options), large)
    assert taken[0] > 0
    assert HOST_BUDGET.in_flight_bytes == 0


def test_arrays_stand_for_themselves_and_stay(mesh):
    state, handler = make_state(mesh), lazy_orbax.standard_handler()
    lazy_orbax.prewarm(handler, state)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
    assert HOST_BUDGET.idle_bytes > 0


def test_without_a_sharding_it_is_the_default_device(tmp_path, compiled):
    state = {"w": jnp.ones((4, 4)), "n": jnp.asarray(3)}
    handler = lazy_orbax.standard_handler()
    lazy_orbax.prewarm(handler, jax.eval_shape(lambda: state))
    compiled.clear()
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        assert compiled == []


def test_a_state_larger_than_the_budget_is_rehearsed_in_parts(mesh):
    state = {f"x{i}": on_mesh(np.ones((256, 256), np.float32), mesh, "a") for i in range(16)}
    options = lazy_orbax.LazyOptions(host_bytes=2**20)
    lazy_orbax.prewarm(lazy_orbax.standard_handler(options=options), abstract_of(state))
    assert HOST_BUDGET.in_flight_bytes == 0
    assert 2**19 < HOST_BUDGET.idle_bytes <= 2**20


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_either_mode_is_rehearsed(mesh, mode, compiled):
    state = make_state(mesh)
    options = lazy_orbax.LazyOptions(mode=mode)
    lazy_orbax.prewarm(lazy_orbax.standard_handler(options=options), abstract_of(state))
    assert compiled
    assert (HOST_BUDGET.idle_bytes > 0) == (mode == "stage")
    assert HOST_BUDGET.in_flight_bytes == 0


def test_what_cannot_be_saved_is_said_before_training():
    with pytest.raises(TreeError, match=r"\['bad'\]"):
        lazy_orbax.prewarm(lazy_orbax.standard_handler(), {"bad": object(), "x": np.ones(3)})


@pytest.mark.parametrize("handler", [ocp.StandardCheckpointHandler(), None, "standard"])
def test_a_handler_of_somebody_else_is_refused(handler):
    with pytest.raises(OptionError, match="does not save lazily"):
        lazy_orbax.prewarm(handler, {"x": np.ones(3)})
