"""The second save of a tree plans nothing; a tree that differs in anything is planned anew."""

import enum
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax._orbax.records import Destination
from lazy_orbax.save import plan_cache as prepare_module
from lazy_orbax.save import tree_identity
from lazy_orbax.save.plan_cache import PLAN_CACHE, prepare
from lazy_orbax.storage import places

MIB = 2**20
BF16 = np.dtype(jnp.bfloat16)


@pytest.fixture
def planned(monkeypatch):
    """What was planned so far, one entry for each time."""
    calls = []
    make = prepare_module.make_prepared

    def counting_make(*args, **kwargs):
        calls.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(prepare_module, "make_prepared", counting_make)
    return calls


@pytest.fixture(scope="module")
def handler():
    return lazy_orbax.LazyCheckpointHandler()


def prepared_of(handler, tree, save_args=None, *, target=None, slab_bytes=MIB):
    prepared, leaves = prepare(
        handler.settings,
        tree,
        save_args,
        destination=Destination(places.place_of("/").stand_in(), target),
        slab_bytes=slab_bytes,
        abstract=False,
    )
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(tree), strict=True))
    return prepared


def example(mesh):
    return {
        "w": on_mesh(np.ones((8, 4), np.float32), mesh, "a", "b"),
        "key": jax.random.key(1),
        "n": np.arange(6, dtype=np.int16),
        "lr": 0.1,
        "step": 3,
        "name": "run",
        "none": None,
    }


def test_other_values_of_the_same_tree_are_not_planned_again(planned, handler, mesh):
    tree = example(mesh)
    first = prepared_of(handler, tree)
    step = jax.jit(lambda x: x + 1)
    for i in range(5):
        tree = {
            **tree,
            "w": step(tree["w"]),
            "key": jax.random.split(tree["key"])[0],
            "n": tree["n"] + np.int16(1),
            "lr": 0.1 / (i + 2),
            "step": i,
            "name": f"run {i}",
        }
        assert prepared_of(handler, tree) is first
    assert len(planned) == 1


def test_an_equal_mesh_made_again_is_the_same(planned, handler):
    def tree():
        mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
        return {"w": on_mesh(np.ones((4, 4), np.float32), mesh, "x")}

    prepared_of(handler, tree())
    prepared_of(handler, tree())
    assert len(planned) == 1


CHANGES = {
    "shape": lambda t, mesh: {**t, "w": on_mesh(np.ones((16, 4), np.float32), mesh, "a", "b")},
    "dtype": lambda t, mesh: {**t, "w": on_mesh(np.ones((8, 4), jnp.bfloat16), mesh, "a", "b")},
    "spec": lambda t, mesh: {**t, "w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")},
    "mesh": lambda t, mesh: {
        **t,
        "w": jax.device_put(t["w"], NamedSharding(Mesh(mesh.devices.T, ("b", "a")), P("a", "b"))),
    },
    "memory kind": lambda t, mesh: {
        **t,
        "w": on_mesh(np.ones((8, 4), np.float32), mesh, "a", "b", memory_kind="pinned_host"),
    },
    "device": lambda t, mesh: {**t, "w": jax.device_put(np.ones((8, 4), np.float32))},
    "NumPy instead of JAX": lambda t, mesh: {**t, "w": np.ones((8, 4), np.float32)},
    "NumPy shape": lambda t, mesh: {**t, "n": np.arange(7, dtype=np.int16)},
    "NumPy dtype": lambda t, mesh: {**t, "n": np.arange(6, dtype=np.int32)},
    "NumPy byte order": lambda t, mesh: {**t, "n": np.arange(6, dtype=">i2")},
    "type of a scalar": lambda t, mesh: {**t, "lr": 1},
    "NumPy scalar": lambda t, mesh: {**t, "step": np.int8(1)},
    "implementation of a key": lambda t, mesh: {**t, "key": jax.random.key(1, impl="rbg")},
    "shape of a key": lambda t, mesh: {**t, "key": jax.random.split(t["key"], 2)},
    "name of a leaf": lambda t, mesh: {("lr2" if k == "lr" else k): v for k, v in t.items()},
    "one leaf more": lambda t, mesh: {**t, "more": 1},
    "one leaf less": lambda t, mesh: {k: v for k, v in t.items() if k != "lr"},
    "empty container": lambda t, mesh: {**t, "none": {}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tree_that_differs_is_planned_anew_and_both_are_remembered(
    planned, handler, mesh, change
):
    tree = example(mesh)
    changed = CHANGES[change](tree, mesh)
    first, second = prepared_of(handler, tree), prepared_of(handler, changed)
    assert len(planned) == 2
    assert prepared_of(handler, tree) is first
    assert prepared_of(handler, changed) is second
    assert len(planned) == 2


class Subclass(np.ndarray):
    """As `np.memmap` is one: Orbax saves it as any other array."""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A broadcast would make of it a leaf of the shape that was planned.
        (np.zeros(4, np.float32).view(Subclass), np.ones(1, np.float32).view(Subclass)),
        (np.zeros(4, np.float32).view(Subclass), np.ones(5, np.float32).view(Subclass)),
        (np.zeros(4, np.float32).view(Subclass), np.ones(4, np.int32).view(Subclass)),
        (5, 2**63),  # NumPy makes of it an unsigned integer.
        (2**63, -5),
    ],
)
def test_what_numpy_would_make_something_else_of_is_planned_anew(tmp_path, before, after):
    with ocp.Checkpointer(lazy_orbax.pytree_handler()) as checkpointer:
        for i, leaf in enumerate((before, after)):
            checkpointer.save(tmp_path / str(i), args=ocp.args.PyTreeSave({"n": leaf}))
    with ocp.PyTreeCheckpointer() as stock:
        for i, leaf in enumerate((before, after)):
            assert_same(
                jax.tree.map(np.asarray, stock.restore(tmp_path / str(i))),
                {"n": np.asarray(leaf)},
            )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, {"w": ocp.SaveArgs(dtype=BF16)}),
        ({"w": ocp.SaveArgs()}, {"w": ocp.SaveArgs(dtype=BF16)}),
        ({"w": ocp.SaveArgs()}, {"w": ocp.SaveArgs(chunk_byte_size=64)}),
        ({"w": ocp.SaveArgs()}, {"w": ocp.SaveArgs(shard_axes=(0,))}),
    ],
)
def test_other_save_args_are_planned_anew(planned, handler, mesh, first, second):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")}
    assert prepared_of(handler, tree, first) is not prepared_of(handler, tree, second)
    assert len(planned) == 2


def test_equal_save_args_made_again_are_the_same(planned, handler, mesh):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a"), "v": 1}
    for _ in range(2):
        prepared_of(handler, tree, {"w": ocp.SaveArgs(dtype=BF16), "v": ocp.SaveArgs()})
    assert len(planned) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, "float16"])
def test_a_cast_to_what_is_no_dtype_yet_works_or_names_the_leaf(handler, mesh, dtype):
    """Stock Orbax fails here, with an `AttributeError` that names nothing."""
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")}
    try:
        prepared = prepared_of(handler, tree, {"w": ocp.SaveArgs(dtype=dtype)})
    except lazy_orbax.errors.TreeError as error:
        assert "['w']" in str(error)
    else:
        assert prepared.format.leaves[0].cast_from == "float32"


def test_save_args_changed_in_place_are_planned_anew(planned, handler, mesh):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")}
    save_args = {"w": ocp.SaveArgs()}
    prepared_of(handler, tree, save_args)
    save_args["w"].dtype = BF16
    prepared_of(handler, tree, save_args)
    assert len(planned) == 2


@pytest.mark.parametrize("knobs", [{"target": 2**20}, {"target": 0}, {"slab_bytes": 2 * MIB}])
def test_other_knobs_of_a_save_are_planned_anew(planned, handler, mesh, knobs):
    tree = example(mesh)
    prepared_of(handler, tree)
    prepared_of(handler, tree, **knobs)
    prepared_of(handler, tree, **knobs)
    assert len(planned) == 2


def registry_with(array_handler):
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, array_handler),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (int, ocp.type_handlers.ScalarHandler()),
        (float, ocp.type_handlers.ScalarHandler()),
        (str, ocp.type_handlers.StringHandler()),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"use_compression": True},
        {"use_ocdbt": False},
        {"use_zarr3": True},
        {"type_handler_registry": registry_with(ocp.type_handlers.ArrayHandler())},
        {
            "pytree_metadata_options": ocp.options.PyTreeMetadataOptions(support_rich_types=True)
            if hasattr(ocp.options, "PyTreeMetadataOptions")
            else None
        },
        {"multiprocessing_options": ocp.options.MultiprocessingOptions(primary_host=None)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_handler_of_other_settings_plans_anew(planned, handler, mesh, settings):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")}
    if None in settings.values():
        pytest.skip("this Orbax has no such option in public")
    other = lazy_orbax.LazyCheckpointHandler(**settings)
    prepared_of(handler, tree)
    prepared_of(other, tree)
    prepared_of(other, tree)
    assert len(planned) == 2


def test_handlers_of_equal_settings_share_a_plan(planned, handler, mesh):
    tree = example(mesh)
    prepared_of(handler, tree)
    prepared_of(lazy_orbax.LazyCheckpointHandler(), tree)
    assert len(planned) == 1


def test_another_type_handler_in_the_registry_plans_anew(planned, mesh):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh)}
    registry = registry_with(ocp.type_handlers.ArrayHandler(use_replica_parallel=True))
    handler = lazy_orbax.LazyCheckpointHandler(type_handler_registry=registry)
    shared = prepared_of(handler, tree)
    registry.add(
        jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True
    )
    alone = prepared_of(handler, tree)
    assert len(planned) == 2
    assert len(shared.plan.slabs[0].pieces) == 8
    assert len(alone.plan.slabs[0].pieces) == 1


def test_the_cache_is_bounded_and_keeps_what_was_used_last(planned, handler):
    trees = [{f"x{i}": 1.0} for i in range(prepare_module._MOST_CACHED + 3)]
    for tree in trees:
        prepared_of(handler, tree)
        prepared_of(handler, trees[0])  # Kept alive by use.
    n = len(trees)
    assert len(planned) == n
    assert len(PLAN_CACHE._entries) == prepare_module._MOST_CACHED
    prepared_of(handler, trees[0])
    prepared_of(handler, trees[-1])
    assert len(planned) == n
    prepared_of(handler, trees[1])
    assert len(planned) == n + 1


def test_a_tree_that_was_refused_is_not_remembered(planned, handler):
    for _ in range(2):
        with pytest.raises(lazy_orbax.errors.TreeError):
            prepared_of(handler, {"a": object()})
    assert len(planned) == 2
    assert len(PLAN_CACHE._entries) == 0


def test_an_array_deleted_since_it_was_planned_is_refused(handler, mesh):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")}
    prepared_of(handler, tree)
    tree["w"].delete()
    with pytest.raises(lazy_orbax.errors.DeletedArrayError, match=r"\['w'\]"):
        prepared_of(handler, tree)


def test_a_plan_does_not_keep_the_arrays_alive(handler, mesh):
    import gc
    import weakref

    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")}
    prepared = prepared_of(handler, tree)
    alive = weakref.ref(tree["w"])
    del tree
    gc.collect()
    assert alive() is None
    assert prepared.plan.n_bytes == 8 * 4 * 4


def test_traced_values_are_refused(handler):
    @jax.jit
    def step(x):
        with pytest.raises(lazy_orbax.errors.TreeError, match="jit"):
            prepared_of(handler, {"x": x})
        return x

    step(jnp.ones(3))


def test_two_threads_may_prepare_at_once(handler):
    gate, found = threading.Barrier(4), []
    tree = {"x": 1.0, "y": np.ones(3)}

    def work():
        gate.wait(30)
        found.append(prepared_of(handler, tree))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4
    assert all(p.plan.slabs[0].pieces == found[0].plan.slabs[0].pieces for p in found)


def test_the_second_save_through_orbax_plans_nothing(planned, tmp_path, mesh):
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.pytree_handler()) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.PyTreeSave(example(mesh)))
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 1, 2]
    assert len(planned) == 1


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("name", ["a/", "a/b", "a//b", "/", "é", " "])
def test_a_name_like_a_path_is_restored_by_stock_or_refused(tmp_path, name, use_ocdbt):
    tree = {name: np.arange(3), "other": np.arange(2)}
    handler = lazy_orbax.pytree_handler(use_ocdbt=use_ocdbt)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(tree))
        except lazy_orbax.errors.TreeError as error:
            assert repr(name) in str(error)
            return
    with ocp.PyTreeCheckpointer() as stock:
        assert_same(stock.restore(tmp_path / "1"), tree)


def test_save_args_of_one_leaf_are_not_those_of_another(tmp_path):
    """`None` where a leaf has no `SaveArgs`: which leaf has them is in the structure alone."""
    tree = {"a": np.arange(4, dtype=np.float32), "b": np.arange(4, dtype=np.float32)}
    cast = ocp.SaveArgs(dtype=np.dtype("float16"))
    with ocp.Checkpointer(lazy_orbax.pytree_handler()) as checkpointer:
        for name, other in (("a", "b"), ("b", "a")):
            args = ocp.args.PyTreeSave(tree, save_args={name: cast, other: None})
            checkpointer.save(tmp_path / name, args=args)
    with ocp.PyTreeCheckpointer() as stock:
        for name, other in (("a", "b"), ("b", "a")):
            found = stock.restore(tmp_path / name)
            assert found[name].dtype == np.float16
            assert found[other].dtype == np.float32


class Word(str, enum.Enum):  # noqa: UP042 - Its name is not its value.
    A = "a"


class Alike:
    """A key that is equal to any other of its kind, as a badly written one may be."""

    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 0

    def __lt__(self, other):
        return False

    def __repr__(self):
        return self.name


EQUAL_KEYS = {
    "bool for int": (1, True),
    "int for bool": (True, 1),
    "float for int": (1, 1.0),
    "NumPy for int": (1, np.int64(1)),
    "negative zero": (0.0, -0.0),
    "int for zero": (-0.0, 0),
    "Enum for str": ("a", Word.A),
    "str for Enum": (Word.A, "a"),
    "NumPy for str": ("a", np.str_("a")),
    "in a tuple": (("a", 1), ("a", True)),
    "of its own kind": (Alike("x"), Alike("y")),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", EQUAL_KEYS)
def test_keys_that_are_equal_and_not_the_same_are_stored_under_their_own_names(
    handler, case, nested, tmp_path
):
    first, second = (
        {"x": FrozenDict({key: np.arange(3)})} if nested else {key: np.arange(3)}
        for key in EQUAL_KEYS[case]
    )
    prepared_of(handler, first)
    prepared = prepared_of(handler, second)
    names = [leaf.name for leaf in prepared.plan.leaves]
    assert names == jax.tree.leaves(ocp.tree.get_param_names(second))
    assert [leaf.keypath for leaf in prepared.plan.leaves] == [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(second)
    ]
    assert prepared_of(handler, second) is prepared


@jax.tree_util.register_pytree_with_keys_class
class Node:
    """A node of a tree with anything beside its child, as static fields of a module are."""

    def __init__(self, child, static):
        self.child, self.static = child, static

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("child"), self.child)], self.static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(children[0], static)


class Raises:
    def __eq__(self, other):
        raise RuntimeError("not to be compared")

    __hash__ = None


STATIC = {
    "an array": lambda: np.arange(3),
    "arrays": lambda: (np.arange(3), {"a": np.arange(2)}),
    "a NumPy scalar": lambda: np.int64(3),
    "raises": Raises,
    "NaN": lambda: float("nan"),
    "a function": lambda: lambda x: x,
}


@pytest.mark.parametrize("static", STATIC)
def test_static_fields_that_cannot_be_compared_are_planned_once(planned, handler, static):
    for _ in range(3):
        prepared_of(handler, {"a": Node(np.arange(3), STATIC[static]())})
    assert len(planned) == 1
    prepared_of(handler, {"b": Node(np.arange(3), STATIC[static]())})
    assert len(planned) == 2


def test_keys_that_are_compared_with_arrays_are_planned_once(planned, handler):
    class Unsorted(dict):
        pass

    jax.tree_util.register_pytree_with_keys(
        Unsorted,
        lambda d: ([(jax.tree_util.DictKey(key), d[key]) for key in d], tuple(d)),
        lambda keys, values: Unsorted(zip(keys, values, strict=True)),
    )
    for tree in ({(1, 2): 1.0}, {np.int64(1): 1.0}, {(1, 2): 1.0}, {np.int64(1): 1.0}):
        prepared = prepared_of(handler, Unsorted(tree))
        assert [leaf.name for leaf in prepared.plan.leaves] == [str(key) for key in tree]
    assert len(planned) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": None, "b": 1.0}, {"a": 1.0, "b": None}),
        ({"a": FrozenDict({1: {}}), "b": 1.0}, {"a": FrozenDict({True: {}}), "b": 1.0}),
        ([1.0], (1.0,)),
        ([[1.0], []], [[], [1.0]]),
    ],
)
def test_what_has_no_leaves_counts(planned, handler, first, second):
    assert prepared_of(handler, first) is not prepared_of(handler, second)
    assert len(planned) == 2


def test_a_save_of_a_thousand_leaves_calls_nothing_of_its_keys(handler, monkeypatch):
    """What it costs to recognize a tree does not grow with names that have to be made anew."""
    tree = {f"layer_{i}": {"w": [1.0] * 10, "b": (2.0,)} for i in range(100)}
    prepared_of(handler, tree)
    monkeypatch.setattr(tree_identity, "_meaning", None)
    prepared_of(handler, jax.tree.map(lambda x: x + 1, tree))
