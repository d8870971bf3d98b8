"""Snapshots that the step makes itself: bit for bit, donated, stored as the state would be."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment import oracle
from equipment.gates import held_at, within
from equipment.training import SLAB_BYTES, Steps, _changed, cached_on_host, make_state, pointers
from equipment.trees import assert_same, on_mesh, random_array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.save import writer
from lazy_orbax.snapshot import snapshot_step, step_copies
from lazy_orbax.snapshot.host_budget import HOST_BUDGET

MIB = 2**20


def everything(mesh):
    """A state of every kind of leaf that a jitted step takes."""
    rng = np.random.default_rng(3)
    return {
        **make_state(mesh),
        "int4": on_mesh(random_array(rng, (16, 8), ml_dtypes.int4), mesh, "a"),
        "bool": on_mesh(random_array(rng, (8, 3), np.bool_), mesh, "b"),
        "float8": on_mesh(random_array(rng, (8, 64), ml_dtypes.float8_e4m3fn), mesh, "a", "b"),
        "complex": on_mesh(random_array(rng, (16, 2), np.complex64), mesh, ("a", "b")),
        "one key": jax.device_put(jax.random.key(7, impl="rbg"), NamedSharding(mesh, P())),
        "one device": jax.device_put(jnp.arange(5), NamedSharding(mesh, P())),
        "nothing": {"none": None, "empty": {}},
        "numpy": rng.standard_normal(6),  # float64, which a step would make float32 of.
        "number": 2**20,
        "rate": 0.1,
        "host": on_mesh(np.ones((8, 3), np.int16), mesh, "a", memory_kind="pinned_host"),
    }


def changed(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype.itemsize > 4:
        return leaf
    return leaf if leaf.dtype in (jnp.bool_, jnp.int4) else _changed(leaf)


def train_step(state, batch=0):
    """Changes every array that it can, in its own sharding."""
    return jax.tree.map(lambda x: changed(x) if isinstance(x, jax.Array) else x, state), batch + 1


def step_of(state, **options):
    """A jitted donating step whose state stays where it is."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        lambda tree: jax.tree.map(_changed, tree), donate_argnums=0, out_shardings=shardings
    )
    return lazy_orbax.SnapshotStep(step, **options)


def manager_of(path, lines=None, **options):
    options = lazy_orbax.LazyOptions(
        slab_bytes=SLAB_BYTES, on_timeline=None if lines is None else lines.append, **options
    )
    return ocp.CheckpointManager(
        path, item_handlers=lazy_orbax.standard_handler(options=options), options=_KEEP
    )


_KEEP = ocp.CheckpointManagerOptions(max_to_keep=2)


def save(path, item, **keywords):
    """Saves one item with a handler of its own. Returns its timeline."""
    lines = []
    options = lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES, on_timeline=lines.append)
    handler = lazy_orbax.pytree_handler(options=options, **keywords)
    with ocp.AsyncCheckpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(item))
        checkpointer.wait_until_finished()
    (line,) = lines
    return line


def stored(path):
    """Everything a checkpoint holds, but for what tells one save from another."""
    found = oracle.stored(path)
    return {n: found[n] for n in found if n not in ("_CHECKPOINT_METADATA", "commit_success.txt")}


@pytest.mark.parametrize(
    "keywords",
    [{}, {"use_zarr3": True, "use_ocdbt": False}, {"use_compression": True}],
    ids=["default", "zarr3", "compressed"],
)
def test_what_is_stored_is_what_a_save_of_the_state_stores(tmp_path, mesh, keywords):
    state = everything(mesh)
    of_state = save(tmp_path / "state", state, **keywords)
    step = lazy_orbax.SnapshotStep(train_step)
    _, snapshot = step.with_snapshot(state)
    assert jax.tree.structure(snapshot) == jax.tree.structure(state)
    of_snapshot = save(tmp_path / "snapshot", snapshot, **keywords)
    assert stored(tmp_path / "snapshot") == stored(tmp_path / "state")
    assert of_snapshot.bytes_written == of_state.bytes_written
    assert of_snapshot.mode == "in_step+direct"  # What was in host memory is not ours.
    assert of_state.mode == "stage+direct"


@pytest.mark.parametrize("place", [None, "to the host", "open", "views", "hand over", "finish"])
def test_a_loop_that_saves_what_its_step_copied(tmp_path, mesh, place):
    state = make_state(mesh)
    steps, step = Steps(state), step_of(state)
    with manager_of(tmp_path) as manager, ocp.StandardCheckpointer() as stock:
        for i in range(5):
            wanted = steps.bytes_of(state)
            state, snapshot = step.with_snapshot(state)
            with held_at(place) as gate:
                manager.save(i, args=ocp.args.StandardSave(snapshot))
                del snapshot
                state = step(step(state))
                gate.opened.set()
                manager.wait_until_finished()
            assert_same(stock.restore(tmp_path / str(i) / "default"), wanted)


def test_both_steps_alias_every_buffer(mesh):
    state = make_state(mesh)
    step = step_of(state)
    state = step(state)
    before = pointers(state)
    for _ in range(3):
        given_away = state
        state, snapshot = step.with_snapshot(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given_away))
        assert pointers(state) == before
        assert cached_on_host(state) == []
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(snapshot)} == {"pinned_host"}
        state = step(state)
        assert pointers(state) == before


def test_the_snapshot_is_written_without_another_copy(tmp_path, mesh, monkeypatch):
    state = make_state(mesh)
    snapshot = step_of(state).with_snapshot(state)[1]
    ours = {p for places in pointers(snapshot).values() for p in places}
    written = []
    handed_over = writer.Writer.write

    def spy(self, pieces):
        pieces = list(pieces)
        for piece, view in pieces:
            if piece.start == piece.shard_start:  # Begins where the shard does.
                written.append(view.ctypes.data)
        return handed_over(self, pieces)

    monkeypatch.setattr(writer.Writer, "write", spy)
    line = save(tmp_path / "item", snapshot)
    assert line.mode == "in_step"
    assert line.reason == "in_step: the step had copied it to pinned host memory"
    assert len(written) >= len(jax.tree.leaves(state))
    assert set(written) <= ours


def test_an_array_in_pinned_host_memory_that_is_not_ours_is_copied(tmp_path, mesh):
    array = on_mesh(np.arange(64.0, dtype=np.float32), mesh, "a", memory_kind="pinned_host")
    lines = []
    with manager_of(tmp_path, lines) as manager:
        with held_at("to the host") as gate:
            manager.save(1, args=ocp.args.StandardSave({"x": array}))
            array.delete()
            gate.opened.set()
            manager.wait_until_finished()
        found = ocp.StandardCheckpointer().restore(tmp_path / "1" / "default")
    assert np.array_equal(np.asarray(found["x"]), np.arange(64.0, dtype=np.float32))
    assert lines[0].mode == "direct"


def test_a_leaf_may_be_replaced(tmp_path, mesh):
    state = make_state(mesh)
    steps = Steps(state)
    wanted = {**steps.bytes_of(state), "step": np.array(5, np.int32)}
    _, snapshot = step_of(state).with_snapshot(state)
    snapshot["step"] = on_mesh(np.array(5, np.int32), mesh)
    line = save(tmp_path / "item", jax.tree.map(lambda leaf: leaf, snapshot))
    assert line.mode == "stage+in_step"
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "item"), wanted)


def test_a_snapshot_is_forgotten_when_it_dies(mesh):
    state = make_state(mesh)
    known = len(step_copies._GIVEN)
    _, snapshot = step_of(state).with_snapshot(state)
    assert len(step_copies._GIVEN) == known + len(jax.tree.leaves(snapshot))
    del snapshot
    gc.collect()
    assert len(step_copies._GIVEN) == known


# The host budget.


def test_bytes_that_exist_are_counted_and_nobody_waits_for_them(tmp_path, mesh):
    """The budget is a fraction of the snapshot: `save()` would wait for a copy, not for this."""
    state = make_state(mesh)
    wanted = Steps(state).bytes_of(state)
    _, snapshot = step_of(state).with_snapshot(state)
    snapshot["host"] = wanted["host"] = np.arange(3)
    lines = []
    with manager_of(tmp_path, lines, host_bytes=MIB) as manager, held_at("open") as gate:
        within(manager.save, 1, args=ocp.args.StandardSave(snapshot))
        assert HOST_BUDGET.in_flight_bytes > 3 * MIB
        gate.opened.set()
        within(manager.wait_until_finished)
    assert HOST_BUDGET.in_flight_bytes == 0
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "1" / "default"), wanted)


def test_an_item_that_is_copied_beside_a_snapshot_waits_and_goes_through(tmp_path, mesh):
    state, other = make_state(mesh), make_state(mesh, seed=1)
    wanted = {"snapshot": Steps(state).bytes_of(state), "copied": Steps(other).bytes_of(other)}
    _, snapshot = step_of(state).with_snapshot(state)
    options = lazy_orbax.LazyOptions(host_bytes=MIB, slab_bytes=MIB)
    handlers = {name: lazy_orbax.standard_handler(options=options) for name in wanted}
    items = {"snapshot": snapshot, "copied": other}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        within(manager.save, 1, args=ocp.args.Composite(**args))
        within(manager.wait_until_finished)
    with ocp.StandardCheckpointer() as stock:
        for name, tree in wanted.items():
            assert_same(stock.restore(tmp_path / "1" / name), tree)


# What the user may get wrong.


def test_a_snapshot_deleted_too_early_fails_its_save_only(tmp_path, mesh):
    state = make_state(mesh)
    steps, step = Steps(state), step_of(state)
    with manager_of(tmp_path) as manager:
        state, snapshot = step.with_snapshot(state)
        with held_at("to the host") as gate:
            manager.save(1, args=ocp.args.StandardSave(snapshot))
            gate.await_call()
            for leaf in jax.tree.leaves(snapshot):
                leaf.delete()
            gate.opened.set()
            with pytest.raises(SaveError, match="deleted"):
                manager.wait_until_finished()
        wanted = steps.bytes_of(state)
        state, snapshot = step.with_snapshot(state)
        manager.save(2, args=ocp.args.StandardSave(snapshot))
        manager.wait_until_finished()
        assert manager.all_steps() == [2]
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "2" / "default"), wanted)


@pytest.mark.parametrize("make", [lazy_orbax.SnapshotStep, lambda x: lazy_orbax.split_step(x, x)])
def test_what_cannot_be_called_is_refused(make):
    with pytest.raises(OptionError, match="None is not callable"):
        make(None)


def test_a_step_that_cannot_be_traced_leaves_the_state_alone(mesh):
    state = make_state(mesh)

    def step(state):
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        lazy_orbax.SnapshotStep(step).with_snapshot(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# Steps and states of other kinds.


def test_without_pinned_host_memory_the_copy_is_made_on_the_device(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(snapshot_step, "has_pinned_host", lambda device: False)
    state = make_state(mesh)
    steps, step = Steps(state), step_of(state)
    state = step(state)
    before, wanted = pointers(state), steps.bytes_of(state)
    state, snapshot = step.with_snapshot(state)
    assert pointers(state) == before
    line = save(tmp_path / "item", snapshot)
    assert "in_step" not in line.mode
    with ocp.StandardCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "item"), wanted)


def single_device_state():
    return {"w": jnp.arange(12.0).reshape(3, 4), "n": jnp.int32(3), "key": jax.random.key(1)}


def add_one(state, scale=1, *, times=1):
    return {"w": state["w"] + scale * times, "n": state["n"] + 1, "key": state["key"]}


@pytest.mark.parametrize("jitted", [False, True])
def test_a_state_that_is_committed_to_no_device(tmp_path, jitted):
    function = jax.jit(add_one, donate_argnums=0, static_argnames="times") if jitted else add_one
    step = lazy_orbax.SnapshotStep(function, static_argnames="times")
    state = single_device_state()
    assert not state["w"].committed
    for i in range(3):
        wanted = jax.tree.map(jnp.copy, state)
        save(tmp_path / f"state_{i}", state)
        state, snapshot = step.with_snapshot(state, 2, times=3)
        assert save(tmp_path / f"snapshot_{i}", snapshot).mode == "in_step"
        assert stored(tmp_path / f"snapshot_{i}") == stored(tmp_path / f"state_{i}")
        assert_same(snapshot, wanted)
        assert np.array_equal(state["w"], wanted["w"] + 6)


def test_a_step_that_spreads_a_state_committed_nowhere(tmp_path, mesh):
    """Its outputs are on eight devices; the state was on one, and so it is stored."""

    def step(state):
        spread = jax.shard_map(lambda x: x + 1, in_specs=P("a"), out_specs=P("a"))
        return {"w": spread(state["w"])}

    state = {"w": jnp.arange(16.0)}
    save(tmp_path / "state", state)
    with jax.set_mesh(mesh):
        after, snapshot = lazy_orbax.SnapshotStep(step).with_snapshot(state)
    assert len(after["w"].sharding.device_set) == 8
    assert np.array_equal(after["w"], np.arange(16.0) + 1)
    assert save(tmp_path / "snapshot", snapshot).mode == "in_step"
    assert stored(tmp_path / "snapshot") == stored(tmp_path / "state")


def test_a_leaf_that_is_committed_nowhere_beside_some_that_are(tmp_path, mesh):
    state = {"w": on_mesh(np.arange(16.0, dtype=np.float32), mesh, "a"), "n": jnp.int32(3)}
    save(tmp_path / "state", state)
    step = lazy_orbax.SnapshotStep(lambda state: jax.tree.map(lambda x: x + 1, state))
    after, snapshot = step.with_snapshot(state)
    assert int(after["n"]) == 4
    assert save(tmp_path / "snapshot", snapshot).mode == "in_step"
    assert stored(tmp_path / "snapshot") == stored(tmp_path / "state")


def test_a_batch_that_decides_where_the_step_runs(tmp_path, mesh):
    state = {"w": jnp.arange(16.0), "n": jnp.int32(3)}
    save(tmp_path / "state", state)
    step = lazy_orbax.SnapshotStep(lambda state, x: jax.tree.map(lambda leaf: leaf + x[0], state))
    after, snapshot = step.with_snapshot(state, on_mesh(np.ones(8, np.float32), mesh, "a"))
    assert len(after["w"].sharding.device_set) == 8
    assert save(tmp_path / "snapshot", snapshot).mode == "in_step"
    assert stored(tmp_path / "snapshot") == stored(tmp_path / "state")


def test_a_step_that_returns_nothing_like_its_state(mesh):
    state = {"w": on_mesh(np.arange(64.0, dtype=np.float32), mesh, "a")}
    step = lazy_orbax.SnapshotStep(lambda state: state["w"].sum())
    total, snapshot = step.with_snapshot(state)
    assert float(total) == 2016
    assert np.array_equal(snapshot["w"], np.arange(64.0))


# Compiling ahead.


@pytest.fixture
def compiled():
    """Names of the programs that are compiled."""
    names = []

    def listen(event, duration_secs, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("kind", ["sharded", "uncommitted"])
def test_nothing_is_compiled_in_the_loop_after_compile(mesh, compiled, kind):
    state = make_state(mesh) if kind == "sharded" else single_device_state()
    step = step_of(state) if kind == "sharded" else lazy_orbax.SnapshotStep(add_one)
    step.compile(state)
    assert compiled
    compiled.clear()
    for _ in range(2):
        state = step(state)
        state, snapshot = step.with_snapshot(state)
        jax.block_until_ready(snapshot)
    assert compiled == []


def test_without_compile_the_second_step_is_compiled_when_it_is_needed(mesh, compiled):
    state = make_state(mesh)
    step = step_of(state)
    state = step(state)
    compiled.clear()
    state = step(state)
    assert compiled == []
    state, _ = step.with_snapshot(state)
    assert [name for name in compiled if "with_copy" in name] == ["jit(with_copy)"]
