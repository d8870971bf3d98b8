"""Orbax v1: what is lazy, who reads it, and that it is of the kind that stock Orbax writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from equipment.gates import held_at, within
from equipment.oracle import STOCK_WARNS
from equipment.training import SLAB_BYTES, Steps, make_state, pointers
from equipment.trees import abstract, assert_same, on_mesh
from orbax.checkpoint import v1

import lazy_orbax
from lazy_orbax.handlers.v1 import lazy_v1, v1_registry
from lazy_orbax.integrity.digest_file import DIRECTORY
from lazy_orbax.save import plan_cache

pytestmark = STOCK_WARNS


@pytest.fixture
def timelines():
    """Makes v1 lazy for a test. Returns the timelines of what it saves."""
    found = []
    undo = lazy_v1(lazy_orbax.LazyOptions(slab_bytes=SLAB_BYTES, on_timeline=found.append))
    yield found
    undo()


@contextlib.contextmanager
def checkpointer(directory):
    with v1.training.Checkpointer(directory) as found:
        yield found


def by_save(root, state):
    v1.save(root / "1", state)


def by_save_async(root, state):
    within(v1.save_async(root / "1", state).result)


def by_save_checkpointables(root, state):
    v1.save_checkpointables(root / "1", {"state": state})


def by_save_checkpointables_async(root, state):
    within(v1.save_checkpointables_async(root / "1", {"state": state}).result)


def by_checkpointer(root, state):
    with checkpointer(root) as run:
        assert run.save(1, state)


def by_checkpointer_async(root, state):
    with checkpointer(root) as run:
        within(run.save_checkpointables_async(1, {"state": state}).result)


WAYS = [
    by_save,
    by_save_async,
    by_save_checkpointables,
    by_save_checkpointables_async,
    by_checkpointer,
    by_checkpointer_async,
]


@pytest.fixture
def everything(mesh):
    """A tree with every kind of leaf that v1 saves."""
    return {
        **make_state(mesh),
        "numpy": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalars": (3, 2.5, True),
        "texts": ["Grüße", ""],
        "key": jax.random.key(7, impl="rbg"),
        "nothing": {"none": None, "list": [], "dict": {}},
    }


@pytest.mark.parametrize("save", WAYS)
def test_what_v1_saves_lazily_stock_v1_and_v0_restore(tmp_path, everything, save):
    timelines = []
    undo = lazy_v1(lazy_orbax.LazyOptions(mode="stage", on_timeline=timelines.append))
    save(tmp_path, everything)
    undo()
    (timeline,) = timelines
    assert timeline.mode.startswith("stage")
    assert timeline.step == 1
    assert timeline.directory == str(tmp_path / "1" / "state")
    assert timeline.durable_s < timeline.committed_s
    by_stock = v1.load(tmp_path / "1")
    v1.save(tmp_path / "stock", everything)
    assert_same(by_stock, v1.load(tmp_path / "stock"))
    with v0.CheckpointManager(tmp_path) as manager:
        arguments = v0.args.Composite(state=v0.args.PyTreeRestore())
        assert_same(manager.restore(1, args=arguments).state, by_stock)
    target = abstract(make_target(everything))
    partial = {name: by_stock[name] for name in target}
    with partial_load():
        assert_same(v1.load(tmp_path / "1", target), partial)


def make_target(tree):
    return {name: tree[name] for name in ("large", "columns", "small", "replicated", "numpy")}


@contextlib.contextmanager
def partial_load():
    context = v1.Context()
    context.pytree.loading.partial_load = True
    with context:
        yield


def half_is_narrow(path, value):
    storage = v1.options.ArrayOptions.Saving.StorageOptions
    narrow = storage(dtype=jnp.bfloat16, chunk_byte_size=2**16)
    return narrow if "half" in jax.tree_util.keystr(path) else None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_compression": False},
        {"use_zarr3": False},
        {"use_ocdbt": False},
        {"use_ocdbt": False, "use_zarr3": False, "use_compression": False},
        {"ocdbt_target_data_file_size": 2**20},
        {"use_replica_parallel": False},
        {"enable_write_sharding_file": False},
        {"array_metadata_store": None},
        {"scoped_storage_options_creator": half_is_narrow},
    ],
    ids=lambda change: ", ".join(change) or "nothing",
)
def test_files_are_of_the_kind_that_the_context_asks_for(tmp_path, mesh, timelines, change):
    state = make_state(mesh)
    if change.get("array_metadata_store", ...) is None:
        del state["keys"]  # Stock Orbax refuses them then.
    for name in ("lazy", "stock"):
        with context_of(change), pytest.MonkeyPatch.context() as patch:
            if name == "stock":
                patch.setattr("lazy_orbax._orbax.v1._of_process", [])
            v1.save(tmp_path / name, state)
    assert len(timelines) == 1
    ours, stock = (tmp_path / name / "state" for name in ("lazy", "stock"))
    assert metadata_of(ours) == metadata_of(stock)
    assert names_in(ours) - {DIRECTORY} == names_in(stock)
    target = abstract(state)
    assert_same(v1.load(tmp_path / "lazy", target), v1.load(tmp_path / "stock", target))


def context_of(change):
    context = v1.Context()
    for name, value in change.items():
        setattr(context.array.saving, name, value)
    return context


def metadata_of(item):
    return json.loads((item / "_METADATA").read_text())


def names_in(item):
    return {name for name in os.listdir(item) if not name.startswith("ocdbt.process_")}


class Counter:
    """A stateful item, which saves itself."""

    def __init__(self, count=0):
        self.count = count

    async def save(self, directory):
        count = self.count

        async def write():
            place = await directory.await_creation()
            (place / "count").write_text(str(count))

        return write()

    async def load(self, directory):
        async def read():
            self.count = int((directory / "count").read_text())

        return read()


def test_several_checkpointables_are_one_step(tmp_path, mesh, timelines):
    state = make_state(mesh)
    items = {
        "state": state,
        "ema": {"large": state["large"], "note": "ä"},
        "iterator": Counter(17),
        "json": {"at": [1, "x", None]},
    }
    names = list(items)
    with checkpointer(tmp_path) as run:
        run.save_checkpointables(1, items, metrics={"loss": 0.5}, custom_metadata={"by": "us"})
        found = run.load_checkpointables(1, {**dict.fromkeys(names), "iterator": Counter()})
        assert found["iterator"].count == 17
        assert found["ema"]["note"] == "ä"
        assert_same(found["state"], state)
        assert run.checkpointables_metadata(1).custom_metadata == {"by": "us"}
        assert run.latest.metrics == {"loss": 0.5}
    ours = {os.path.basename(line.directory) for line in timelines if line.committed_s}
    assert {"state", "ema"} <= ours
    assert lazy_orbax.verify(tmp_path).is_whole


def test_a_new_handler_for_each_save_goes_on_where_the_last_one_was(
    tmp_path, mesh, timelines, monkeypatch
):
    made = []
    make = plan_cache.make_plan
    monkeypatch.setattr(plan_cache, "make_plan", lambda *a, **k: made.append(1) or make(*a, **k))
    state = {**make_state(mesh), "text": "ä", "n": 3}
    with checkpointer(tmp_path) as run:
        for n in range(3):
            run.save(n, state, force=True)
    v1.save(tmp_path / "4", state)
    assert len(made) == 1
    wanted = [None, *(str(tmp_path / f"{n}" / "state") for n in (0, 1, 2))]
    assert [line.same_as for line in timelines] == wanted


@pytest.mark.parametrize("n_saves", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_saves_in_a_row_of_a_state_that_is_donated_at_once(tmp_path, mesh, timelines, n_saves):
    rng = random.Random(0)
    state = make_state(mesh)
    steps = Steps(state)
    state = steps.donating(state)  # The first one was not made by a program.
    wanted, responses = {}, []
    for n in range(n_saves):
        before = pointers(state)
        state = steps.donating(state)
        assert pointers(state) == before
        if n % 5 == 0:
            wanted[n] = steps.bytes_of(state)
        responses.append(v1.save_async(tmp_path / f"{n}", state))
        state = steps.donating(state)
        steps.compute(rng.randrange(200))  # The write thread is somewhere else each time.
        if rng.random() < 0.5:
            within(responses.pop(rng.randrange(len(responses))).result)
    for response in responses:
        within(response.result)
    assert sorted(os.listdir(tmp_path), key=int) == [str(n) for n in range(n_saves)]
    assert sum(line.committed_s is not None for line in timelines) == n_saves
    for n, value in wanted.items():
        assert_same(v1.load(tmp_path / f"{n}", abstract(state)), value)


def test_saves_of_several_threads_do_not_touch_each_other(tmp_path, mesh, timelines):
    state = make_state(mesh)
    errors = []

    def save_some(thread):
        try:
            for n in range(4):
                v1.save(tmp_path / f"{thread}{n}", state)
        except Exception as error:  # noqa: BLE001 - It is looked at below.
            errors.append(error)

    threads = [threading.Thread(target=save_some, args=(i,)) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        within(thread.join)
    assert errors == []
    assert len(os.listdir(tmp_path)) == 12
    assert all(line.committed_s is not None for line in timelines)
    assert lazy_orbax.verify(tmp_path).is_whole


def test_the_default_policy_saves_when_none_is_in_progress(tmp_path, mesh, timelines):
    state = make_state(mesh)
    with checkpointer(tmp_path) as run:
        run.save(1, state)
        with held_at("hand over") as gate:
            assert run.save_async(2, state) is not None
            gate.await_call()
            assert run.is_saving_in_progress()
            assert run.save_async(3, state) is None
            gate.opened.set()
            within(run.wait)
        assert run.save_async(4, state) is not None
        within(run.wait)
        assert [found.step for found in run.checkpoints] == [1, 2, 4]
    assert [line.step for line in timelines] == [1, 2, 4]


@pytest.mark.skipif(
    not hasattr(v1.training.Checkpointer, "delete"), reason="this Orbax deletes no step by hand"
)
def test_a_step_is_deleted(tmp_path, mesh):
    with checkpointer(tmp_path) as run:
        for step in range(3):
            run.save(step, make_state(mesh))
        run.delete(1)
        assert [found.step for found in run.checkpoints] == [0, 2]


def test_a_step_is_overwritten(tmp_path, mesh, timelines):
    first, second = make_state(mesh, 1), make_state(mesh, 2)
    v1.save(tmp_path / "5", first)
    with pytest.raises(ValueError, match="already exists"):
        v1.save(tmp_path / "5", second)
    v1.save(tmp_path / "5", second, overwrite=True)
    assert_same(v1.load(tmp_path / "5"), second)
    with checkpointer(tmp_path / "run") as run:
        run.save(1, first)
        run.save(1, second, overwrite=True, force=True)
        assert_same(run.load(1), second)


def test_a_save_in_a_notebook_after_one_that_was_not(tmp_path, mesh, timelines):
    """An event loop runs there: the second save took the number of the first, and was lost."""
    state = make_state(mesh)
    v1.save(tmp_path / "1", state)

    async def cell():
        v1.save(tmp_path / "2", state)
        return v1.load(tmp_path / "2", abstract(state))

    assert_same(asyncio.run(cell()), state)


def test_another_mesh_and_another_dtype(tmp_path, mesh, timelines):
    state = {"w": on_mesh(np.arange(64, dtype=np.float32).reshape(8, 8), mesh, "a", "b")}
    v1.save(tmp_path / "1", state)
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("a", "b")))
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=columns)}
    found = v1.load(tmp_path / "1", target)["w"]
    assert found.sharding == columns
    np.testing.assert_array_equal(np.asarray(found), np.asarray(state["w"], jnp.bfloat16))
    plain = v1.load(tmp_path / "1", {"w": np.zeros(1)})["w"]
    assert isinstance(plain, np.ndarray)
    assert v1.metadata(tmp_path / "1").metadata["w"].shape == (8, 8)


def test_a_leaf_of_another_shape_is_named_in_the_words_of_orbax(tmp_path, mesh, timelines):
    v1.save(tmp_path / "1", {"w": on_mesh(np.ones((8, 8)), mesh, "a"), "n": np.arange(3)})
    target = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=ONE), "n": np.zeros(3)}
    named = r"\['w'\]: found \[8, 8\], wanted \[4, 8\].* not compatible with the stored shape"
    with pytest.raises(lazy_orbax.errors.RestoreError, match=named):
        v1.load(tmp_path / "1", target)


ONE = jax.sharding.SingleDeviceSharding(jax.devices()[1])
PLAIN = {"w": np.arange(8.0, dtype=np.float32), "n": np.arange(5), "i": 3, "f": 2.5, "s": "ä"}
TARGETS = {
    "another dtype of NumPy": {"w": np.zeros(8), "n": np.zeros(5, np.int8)},
    "an array of NumPy on a device": {"n": jax.ShapeDtypeStruct((5,), jnp.int32, sharding=ONE)},
    "another dtype on a device": {"w": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=ONE)},
    "without a sharding": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)},
    "types": {"w": jax.Array, "n": np.ndarray, "i": int, "f": float, "s": str},
    "None": dict.fromkeys("wnifs"),
    "another type of number": {"i": 0.5, "f": 1},
    "numbers as strings": {"i": str, "f": str},
    "arrays": {"w": jnp.zeros(8)},
    "placeholders": {"w": ..., "s": ...},
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_means_what_it_means_to_stock(tmp_path, timelines, target):
    v1.save(tmp_path / "1", {**PLAIN, "w": jnp.asarray(PLAIN["w"])})
    wanted = {**PLAIN, "w": jnp.zeros(8), **target}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazy_orbax._orbax.v1._of_process", [])
        by_stock = v1.load(tmp_path / "1", wanted)
    found = v1.load(tmp_path / "1", wanted)
    assert_same(found, by_stock)
    assert jax.tree.map(kind_of, found) == jax.tree.map(kind_of, by_stock)


def kind_of(leaf):
    return type(leaf), getattr(leaf, "sharding", None)


def test_what_is_loaded_is_read_by_plan(tmp_path, mesh):
    state, restores = make_state(mesh), []
    undo = lazy_v1(lazy_orbax.LazyOptions(on_restore=restores.append))
    v1.save(tmp_path / "1", state)
    assert_same(v1.load(tmp_path / "1", abstract(state)), state)
    undo()
    assert restores[0].all_by_orbax is None
    assert set(restores[0].by_orbax) == {"keys"}  # Orbax puts those together again.


class Word:
    """A leaf of a type that Orbax does not know."""

    def __init__(self, text):
        self.text = text


class WordHandler:
    """Writes words to a file of its own."""

    made = 0

    def __init__(self, context=None):
        del context
        WordHandler.made += 1

    async def serialize(self, params, context):
        texts = {param.name: param.value.text for param in params}

        async def write():
            place = await context.parent_dir.await_creation()
            (place / "words.json").write_text(json.dumps(texts))

        return write()

    async def deserialize(self, params, context):
        async def read():
            texts = json.loads((context.parent_dir / "words.json").read_text())
            return [Word(texts[param.name]) for param in params]

        return read()

    async def metadata(self, params, context):
        return [Word("") for _ in params]


class WithWords(v1.handlers.PyTreeHandler):
    """A handler of trees with words in them."""

    def __init__(self):
        leaves = type(v1.handlers.PyTreeHandler()._leaf_handler_registry)()
        leaves.add(Word, Word, WordHandler)
        super().__init__(leaf_handler_registry=leaves)


def test_leaves_of_a_users_type_are_written_by_their_handler(tmp_path, mesh, timelines):
    context = v1.Context()
    registry = v1.handlers.local_registry()
    registry.add(WithWords, checkpointable_name="words")
    context.checkpointables.registry = registry
    state = {**make_state(mesh), "first": Word("ä"), "second": [Word("b")]}
    with context:
        for n in range(3):
            v1.save_checkpointables(tmp_path / f"{n}", {"words": state})
        found = v1.load_checkpointables(tmp_path / "2", {"words": abstract(state)})["words"]
    assert (found["first"].text, found["second"][0].text) == ("ä", "b")
    assert_same({name: found[name] for name in make_state(mesh)}, make_state(mesh))
    assert [line.same_as is None for line in timelines] == [True, False, False]
    assert len(plan_cache.PLAN_CACHE._entries) == 1


def test_a_context_of_its_own_saves_lazily_and_no_other_does(tmp_path, mesh):
    state, timelines = make_state(mesh), []
    options = lazy_orbax.LazyOptions(on_timeline=timelines.append)
    context = v1.Context()
    context.checkpointables.registry = v1_registry(options)
    with context:
        v1.save(tmp_path / "1", state)
        v1.save_checkpointables(tmp_path / "2", {"params": state})
    v1.save(tmp_path / "3", state)
    with v1.training.Checkpointer(tmp_path / "run", context=context) as run:
        run.save(1, state)
    assert [os.path.relpath(line.directory, tmp_path) for line in timelines] == [
        "1/state",
        "2/params",
        "run/1/state",
    ]
    # Others find the handler by its name.
    first, third = (
        json.loads((tmp_path / n / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        for n in ("1", "3")
    )
    assert first == third
    assert_same(v1.load(tmp_path / "1"), state)
