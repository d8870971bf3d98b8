"""Whatever JAX is told to do elsewhere, what is saved is what was there, bit for bit."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment import contexts
from equipment.daily import rotated
from equipment.oracle import STOCK_WARNS, attempt
from equipment.trees import abstract, assert_same, on_mesh, random_array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax import _jax_context
from lazy_orbax.integrity.digest_file import DIRECTORY

pytestmark = STOCK_WARNS
_COUNT = itertools.count()
LOOKING = ("debug_nans", "debug_infs")
SOME = (
    "check_tracer_leaks=True",
    "debug_infs=True",
    "debug_nans=True",
    "disable_jit=True",
    "enable_x64=True",
    "global debug_nans",
    "none",
    "set_mesh explicit",
    "transfer_guard=disallow_explicit",
)


def fresh_mesh(**keywords) -> Mesh:
    """A mesh that no test had before: every program for it is yet to be compiled."""
    names = [f"{axis}{next(_COUNT)}" for axis in "ab"]
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), tuple(names), **keywords)


def state():
    """Leaves of few dtypes, NaNs and infinities, in every kind of slab; made where all may be."""
    rng = np.random.default_rng(7)
    mesh, explicit = fresh_mesh(), fresh_mesh(axis_types=(AxisType.Explicit,) * 2)
    (a, b), (c, d) = mesh.axis_names, explicit.axis_names
    key = jax.random.key(3, impl="rbg")
    with jax.enable_x64(True):
        return {
            "shared": on_mesh(random_array(rng, (16, 2), np.int64), mesh, a),
            "sharded": on_mesh(random_array(rng, (16, 8), np.uint64), mesh, a, b),
            "replicated": on_mesh(random_array(rng, (3, 5), np.float64), mesh),
            "not numbers": on_mesh(np.full((8, 8), np.nan, np.float32), mesh, a),
            "infinite": on_mesh(np.full((8, 8), np.inf, ml_dtypes.bfloat16), mesh, a),
            "explicit": on_mesh(random_array(rng, (8, 6), np.int64), explicit, c, d),
            "key": jax.device_put(key, NamedSharding(explicit, P())),
            "alone": jax.device_put(
                random_array(rng, (6 + next(_COUNT),), np.complex128), jax.devices()[5]
            ),
            "numpy": random_array(rng, (4,), np.float64),
            "number": 2**40,
        }


def manager_of(path, mode="auto", **options):
    options = lazy_orbax.LazyOptions(mode=mode, **options)
    return ocp.CheckpointManager(path, item_handlers=lazy_orbax.standard_handler(options=options))


def save(manager, how, step, tree):
    args = ocp.args.StandardSave(tree)
    if how == "save":
        manager.save(step, args=args)
        manager.wait_until_finished()
        return
    with lazy_orbax.Preemption(grace_s=60) as notice:
        outcome = notice.last_save(manager, step, args=args)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.committed


def restored_by_stock(path, step, like):
    """What stock Orbax restores where nothing is set but that 64-bit types are allowed."""
    args = ocp.args.StandardRestore(abstract(like))
    with (
        jax.enable_x64(True),
        ocp.CheckpointManager(path, item_handlers=ocp.StandardCheckpointHandler()) as stock,
    ):
        return stock.restore(step, args=args)


def assert_saved(path, step, tree):
    with jax.enable_x64(True):
        assert_same(restored_by_stock(path, step, tree), tree)
    assert lazy_orbax.verify(path / str(step) / "default").ok


def seen(nan):
    """Everything that this thread has set, and whether JAX does look for NaNs."""
    values = {name: getattr(jax.config, f"jax_{name}") for name in _jax_context._NEUTRAL}
    mesh = jax.sharding.get_mesh(), jax.sharding.get_abstract_mesh()
    looks = [attempt(lambda f=f: f(nan))[0] == "refused" for f in (jnp.negative, jax.jit(abs))]
    return values, mesh, looks


@pytest.mark.parametrize(
    ("context", "mode", "how"),
    rotated(contexts.ALL, [("stage", "save"), ("direct", "save"), ("stage", "last_save")]),
)
def test_what_is_saved_is_what_was_there(tmp_path, context, mode, how):
    tree = state()
    nan = jnp.asarray(np.nan)
    with manager_of(tmp_path, mode) as manager, contexts.ALL[context]():
        before = seen(nan)
        save(manager, how, 0, tree)
        assert seen(nan) == before
    assert_saved(tmp_path, 0, tree)


@pytest.mark.parametrize(
    "context",
    [*SOME, "compile time", "no_execution=True", "no_tracing=True", "numpy_rank_promotion=raise"],
)
def test_a_save_is_verified_wherever_it_is_made(tmp_path, context):
    """The programs that verify it run under settings that are the same every time."""
    tree, nan = state(), jnp.asarray(np.nan)
    with manager_of(tmp_path, verify_snapshot=1) as manager, contexts.ALL[context]():
        before = seen(nan)
        save(manager, "save", 0, tree)
        assert seen(nan) == before
    digests = tmp_path / "0" / "default" / DIRECTORY / "process_0"
    assert "proof" in json.loads(digests.read_bytes())
    assert_saved(tmp_path, 0, tree)


@pytest.mark.parametrize("context", contexts.ALL)
def test_what_was_restored_is_verified_where_stock_restores(tmp_path, context):
    """Stock itself restores no 64-bit leaf where such types are not allowed."""
    wide = (
        () if "enable_x64" in context else ("shared", "sharded", "replicated", "explicit", "alone")
    )
    tree = {name: leaf for name, leaf in state().items() if name not in wide}
    with manager_of(tmp_path) as manager:
        save(manager, "save", 0, tree)

    def restored(handler):
        with (
            ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager,
            contexts.ALL[context](),
        ):
            return manager.restore(0, args=ocp.args.StandardRestore(abstract(tree)))

    how, wanted = attempt(lambda: restored(ocp.StandardCheckpointHandler()))
    found = attempt(lambda: restored(lazy_orbax.standard_handler()))
    assert found[0] == how, found[1]
    if how == "accepted":
        with jax.enable_x64(True):
            assert_same(found[1], wanted)


@contextlib.contextmanager
def compiled(caplog):
    """What XLA compiled meanwhile."""
    names = []
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        caplog.clear()
        yield names
    messages = [record.getMessage() for record in caplog.records]
    names += [text for text in messages if text.startswith("Finished XLA compilation")]


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_under_other_flags_nothing_is_compiled_again(tmp_path, mode, caplog):
    tree = state()
    flags = [name for name in contexts.FLAGS if not name.startswith("global ")]
    # These are not set back: they change no copy, and few change them from save to save.
    unknown = ("enable_custom_prng", "legacy_prng_key", "remove_size_one", "softmax")
    flags = [name for name in flags if not name.startswith(unknown)]
    with manager_of(tmp_path, mode) as manager:
        with compiled(caplog) as names:
            save(manager, "save", 0, tree)
        assert names or mode == "direct"
        for step, name in enumerate([*flags, "set_mesh", "set_mesh explicit"], start=1):
            with compiled(caplog) as names, contexts.ALL[name]():
                save(manager, "save", step, tree)
            assert names == [], name


@pytest.mark.parametrize("looking", LOOKING)
def test_that_jax_is_to_look_for_nans_counts_after_a_save_as_well(tmp_path, looking):
    """JAX has no more than one such look in a thread where another of them ended."""
    with manager_of(tmp_path, "stage") as manager:
        save(manager, "save", 0, state())
        with contexts.FLAGS[f"global {looking}"]():
            with pytest.raises(FloatingPointError):
                jax.jit(lambda x: x / 0.0)(jnp.asarray(float("infs" in looking)))
            save(manager, "save", 1, state())
            with pytest.raises(FloatingPointError):
                jax.jit(lambda x: x / 0.0)(jnp.asarray(float("infs" in looking)))


@pytest.mark.parametrize("context", [name for name in SOME if name != "set_mesh explicit"])
def test_a_snapshot_of_the_step_is_what_was_there(tmp_path, context):
    """Where the step itself may run: here it takes away all that JAX may look for."""
    names = ("shared", "sharded", "replicated", "not numbers", "infinite")
    tree = {name: leaf for name, leaf in state().items() if name in names}
    ours = jax.device_put(tree, may_alias=False)

    @jax.jit
    def train_step(tree):
        taken_away = ("not numbers", "infinite")
        return {n: jnp.ones_like(x) if n in taken_away else x for n, x in tree.items()}

    with contexts.ALL[context](), manager_of(tmp_path) as manager:
        _, snapshot = lazy_orbax.SnapshotStep(train_step).with_snapshot(ours)
        save(manager, "save", 0, snapshot)
    assert_saved(tmp_path, 0, tree)


@pytest.mark.parametrize("context", SOME)
def test_a_prewarmed_save_compiles_nothing(tmp_path, context, caplog):
    """Under whatever context either was."""
    tree = state()
    handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(mode="stage"))
    with contexts.ALL[context]():
        lazy_orbax.prewarm(handler, tree)
    with (
        ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager,
        compiled(caplog) as names,
    ):
        save(manager, "save", 0, tree)
    assert names == []
    assert_saved(tmp_path, 0, tree)


def test_prewarm_takes_the_default_device(tmp_path, caplog):
    device = jax.devices()[5]
    handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(mode="stage"))
    with jax.default_device(device):
        leaf = jnp.arange(11 + next(_COUNT), dtype=jnp.float32)
        lazy_orbax.prewarm(handler, {"x": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)})
    assert leaf.devices() == {device}
    with (
        ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager,
        compiled(caplog) as names,
    ):
        save(manager, "save", 0, {"x": leaf})
    assert names == []


@pytest.mark.parametrize("how", ["save", "last_save"])
def test_an_item_of_another_handler_is_saved_as_the_caller_would(tmp_path, how, monkeypatch):
    """It may compute what it saves; only what JAX checks is not checked in the last save."""
    seen, save_json = [], ocp.JsonCheckpointHandler.async_save
    variable = contextvars.ContextVar("variable", default="nothing")

    async def async_save(self, *args, **kwargs):
        third = jnp.asarray(1.0) / 3
        device = jax.config.jax_default_device
        seen.append((str(third.dtype), device, jax.sharding.get_mesh(), variable.get()))
        return await save_json(self, *args, **kwargs)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", async_save)
    device, mesh = jax.devices()[3], fresh_mesh()
    handlers = {"state": lazy_orbax.standard_handler(), "theirs": ocp.JsonCheckpointHandler()}
    state_args = ocp.args.StandardSave({"x": np.arange(3)})
    args = ocp.args.Composite(state=state_args, theirs=ocp.args.JsonSave({}))
    variable.set("set")
    with (
        ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager,
        jax.enable_x64(True),
        jax.default_device(device),
        jax.set_mesh(mesh),
    ):
        if how == "save":
            manager.save(0, args=args)
            manager.wait_until_finished()
        else:
            with lazy_orbax.Preemption(grace_s=60) as notice:
                assert notice.last_save(manager, 0, args=args).committed
    assert seen == [("float64", device, mesh, "set")]
