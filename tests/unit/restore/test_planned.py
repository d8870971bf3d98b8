"""A restore by plan against what was saved and against stock: any mesh, format, dtype, target."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh, random_array
from etils import epath
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax import LazyOptions
from lazy_orbax.errors import CorruptCheckpointError, RestoreError
from lazy_orbax.restore import either_way

RNG = np.random.default_rng(1)
DTYPES = [
    np.float32,
    np.int8,
    np.uint16,
    np.bool_,
    np.complex64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
]
FORMATS = {
    "ours": (lazy_orbax.LazyCheckpointHandler, {}),
    "ours, zarr3": (lazy_orbax.LazyCheckpointHandler, {"use_zarr3": True}),
    "ours, compressed": (lazy_orbax.LazyCheckpointHandler, {"use_compression": True}),
    "ours, plain Zarr": (lazy_orbax.LazyCheckpointHandler, {"use_ocdbt": False}),
    "stock": (ocp.PyTreeCheckpointHandler, {}),
    "stock, zarr3": (ocp.PyTreeCheckpointHandler, {"use_zarr3": True}),
    "stock, plain Zarr": (ocp.PyTreeCheckpointHandler, {"use_ocdbt": False}),
    "stock, uncompressed": (ocp.PyTreeCheckpointHandler, {"use_compression": False}),
}


def mesh(*shape):
    n = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:n]).reshape(shape), ("a", "b")[: len(shape)])


TARGETS = {
    "same": lambda: NamedSharding(mesh(4), P("a")),
    "axis 1": lambda: NamedSharding(mesh(4), P(None, "a")),
    "2 x 2": lambda: NamedSharding(mesh(2, 2), P("a", "b")),
    "partly replicated": lambda: NamedSharding(mesh(2, 2), P("b")),
    "replicated": lambda: NamedSharding(mesh(4), P()),
    "one device": lambda: SingleDeviceSharding(jax.devices()[1]),
    "part of the mesh": lambda: NamedSharding(mesh(2), P("a")),
}


def state():
    """Leaves of every dtype on four devices; small ones, and some that make runs of their own."""
    tree = {
        np.dtype(dtype).name: on_mesh(random_array(RNG, (8, 12), dtype), mesh(4), "a")
        for dtype in DTYPES
    }
    tree["large"] = on_mesh(random_array(RNG, (1024, 512), np.float32), mesh(4), "a")
    tree["odd"] = on_mesh(random_array(RNG, (7, 5), np.float32), mesh(4))
    tree["scalar"] = on_mesh(np.float32(2.5), mesh(4))
    return tree


def saved(directory, handler, tree, args=ocp.args.PyTreeSave):
    ocp.Checkpointer(handler).save(epath.Path(directory), args=args(tree))


def arguments(tree, sharding, dtype=None):
    def one(leaf):
        fits = leaf.ndim >= 2 and all(
            n % part == 0 for n, part in zip(leaf.shape, _parts(sharding, leaf.shape), strict=True)
        )
        place = sharding if fits else NamedSharding(mesh(4), P())
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return ocp.ArrayRestoreArgs(
            sharding=place,
            global_shape=leaf.shape,
            dtype=dtype if dtype and is_float and leaf.dtype != ml_dtypes.float8_e4m3fn else None,
        )

    return jax.tree.map(one, tree)


def _parts(sharding, shape):
    if not isinstance(sharding, NamedSharding):
        return (1,) * len(shape)
    spec = (*sharding.spec, *(None for _ in range(len(shape) - len(sharding.spec))))
    return tuple(1 if axis is None else sharding.mesh.shape[axis] for axis in spec)


def restored(directory, tree, args, **options):
    """What was restored, and its timeline."""
    seen = []
    options = LazyOptions(on_restore=seen.append, **options)
    handler = lazy_orbax.LazyCheckpointHandler(options=options)
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    value = ocp.Checkpointer(handler).restore(
        epath.Path(directory), args=lazy_orbax.args.LazyRestore(item, args)
    )
    (timeline,) = seen
    return value, timeline


def by_stock(directory, tree, args):
    handler = ocp.PyTreeCheckpointHandler()
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    return ocp.Checkpointer(handler).restore(
        epath.Path(directory), args=ocp.args.PyTreeRestore(item, args)
    )


def assert_same_placed(found, wanted):
    assert_same(found, wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.sharding == other.sharding
        assert (one.committed, one.weak_type, one.aval) == (
            other.committed,
            other.weak_type,
            other.aval,
        )


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_comes_back_on_each_mesh_as_stock_restores_it(tmp_path, name):
    make, keywords = FORMATS[name]
    tree = state()
    args = lazy_orbax.args.LazySave if "ours" in name else ocp.args.PyTreeSave
    saved(tmp_path / "c", make(**keywords), tree, args)
    for target in TARGETS.values():
        wanted = arguments(tree, target())
        found, timeline = restored(tmp_path / "c", tree, wanted)
        assert timeline.all_by_orbax is None
        assert not timeline.by_orbax
        assert_same(found, tree)
        assert_same_placed(found, by_stock(tmp_path / "c", tree, wanted))


@pytest.mark.parametrize("name", ["ours", "ours, compressed", "stock"])
@pytest.mark.parametrize("target", ["same", "axis 1"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_casts_are_those_of_stock(tmp_path, name, target, dtype):
    make, keywords = FORMATS[name]
    tree = state()
    args = lazy_orbax.args.LazySave if "ours" in name else ocp.args.PyTreeSave
    saved(tmp_path / "c", make(**keywords), tree, args)
    wanted = arguments(tree, TARGETS[target](), jnp.dtype(dtype))
    found, timeline = restored(tmp_path / "c", tree, wanted)
    assert timeline.all_by_orbax is None
    assert_same_placed(found, by_stock(tmp_path / "c", tree, wanted))


def test_each_byte_is_read_once_in_few_reads(tmp_path):
    tree = {
        f"x{i}": on_mesh(random_array(RNG, (64, 64), np.float32), mesh(4), "a") for i in range(50)
    }
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    for target in ("same", "axis 1", "replicated"):
        _, timeline = restored(tmp_path / "c", tree, arguments(tree, TARGETS[target]()))
        assert timeline.bytes_read <= 1.02 * sum(leaf.nbytes for leaf in tree.values())
        # How many files TensorStore made of the 200 chunks, and in which order, is by chance.
        assert timeline.requests <= 200 / 5
        assert timeline.n_leaves == 50


@pytest.mark.parametrize(("many", "given_back"), [(1, 1), (100, 0)])
def test_what_described_the_leaves_is_let_go_before_they_are_read(
    tmp_path, monkeypatch, many, given_back
):
    tree = {"a": on_mesh(np.arange(8.0), mesh(4), "a"), "b": on_mesh(np.ones(3), mesh(4))}
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    read_planned, seen = either_way.read_planned, []

    def looked_at(wanted, contents, *args, **kwargs):
        seen.append(contents.files.is_begun("_METADATA"))
        return read_planned(wanted, contents, *args, **kwargs)

    monkeypatch.setattr(either_way, "read_planned", looked_at)
    monkeypatch.setattr(either_way, "give_back_memory", lambda: seen.append("given back"))
    monkeypatch.setattr(either_way, "_MANY_LEAVES", many)
    found, _ = restored(tmp_path / "c", tree, arguments(tree, TARGETS["same"]()))
    assert seen == ["given back"] * given_back + [False]
    assert_same(found, tree)


def test_the_moments_of_a_restore_follow_each_other(tmp_path):
    tree = state()
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    progress = []
    _, timeline = restored(
        tmp_path / "c",
        tree,
        arguments(tree, TARGETS["same"]()),
        on_restore_progress=lambda done, total: progress.append((done, total)),
    )
    moments = [
        getattr(timeline, f"{name}_s")
        for name in ("planned", "first_byte", "read", "on_device", "verified")
    ]
    assert moments == sorted(moments)
    assert progress[-1] == (timeline.bytes_wanted,) * 2
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_what_is_unusual_goes_the_way_of_orbax_and_is_said(tmp_path):
    tree = {
        "w": on_mesh(random_array(RNG, (8, 4), np.float32), mesh(4), "a"),
        "key": jax.random.key(3),
        "name": "a string",
        "host": RNG.standard_normal((3, 2)),
        "n": 7,
        "none": None,
        "empty": {},
    }
    saved(tmp_path / "c", lazy_orbax.pytree_handler(), tree, ocp.args.PyTreeSave)
    seen = []
    handler = lazy_orbax.pytree_handler(options=LazyOptions(on_restore=seen.append))
    found = ocp.Checkpointer(handler).restore(
        epath.Path(tmp_path / "c"),
        args=ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree)),
    )
    assert_same(found, tree)
    (timeline,) = seen
    assert set(timeline.by_orbax) == {"key", "name"}
    assert timeline.all_by_orbax is None
    assert timeline.n_leaves == 3


@pytest.mark.parametrize("what", ["key", "string"])
def test_leaves_that_orbax_restores_are_verified_too(tmp_path, what):
    tree = {"w": on_mesh(np.ones((8, 4), np.float32), mesh(4), "a"), "s": "a string"}
    if what == "key":
        tree["s"] = jax.random.key(3)
    saved(tmp_path / "c", lazy_orbax.pytree_handler(), tree, ocp.args.PyTreeSave)
    handler = lazy_orbax.pytree_handler()
    inside = handler._handler_impl

    class Changed(type(inside).__mro__[1]):
        """Orbax, which restores something else."""

        def restore(self, *args, **kwargs):
            found = super().restore(*args, **kwargs)
            found["s"] = jax.random.key(4) if what == "key" else "another"
            return found

    inside.__class__ = type("Inside", (type(inside), Changed), {})
    with pytest.raises(CorruptCheckpointError, match="leaf s"):
        ocp.Checkpointer(handler).restore(
            epath.Path(tmp_path / "c"),
            args=ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree)),
        )


def test_placeholders_stay(tmp_path):
    tree = {"a": on_mesh(np.ones((8, 4), np.float32), mesh(4), "a"), "b": np.arange(3)}
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    args = ocp.checkpoint_utils.construct_restore_args(tree)
    found = ocp.Checkpointer(lazy_orbax.LazyCheckpointHandler()).restore(
        epath.Path(tmp_path / "c"), args=lazy_orbax.args.LazyRestore({**tree, "b": ...}, args)
    )
    assert found["b"] is ...
    assert_same(found["a"], tree["a"])


def test_a_step_that_donates_what_was_restored_is_right_and_so_is_a_save(tmp_path):
    # Replicas share memory, and a slab is under all small leaves.
    tree = {f"x{i}": on_mesh(np.full((8, 8), i, np.float32), mesh(4)) for i in range(20)}
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    wanted = arguments(tree, NamedSharding(mesh(4), P()))
    found, _ = restored(tmp_path / "c", tree, wanted)
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    for _ in range(3):
        found = step(found)
    for i in range(20):
        np.testing.assert_array_equal(found[f"x{i}"], np.full((8, 8), i + 3, np.float32))
    saver = ocp.AsyncCheckpointer(lazy_orbax.LazyCheckpointHandler())
    saver.save(epath.Path(tmp_path / "d"), args=lazy_orbax.args.LazySave(found))
    found = step(found)
    saver.wait_until_finished()
    again, _ = restored(tmp_path / "d", tree, wanted)
    for i in range(20):
        np.testing.assert_array_equal(again[f"x{i}"], np.full((8, 8), i + 3, np.float32))


def test_numpy_leaves_are_the_callers_own(tmp_path):
    tree = {"a": np.arange(6.0), "b": np.arange(4)}
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = ocp.Checkpointer(lazy_orbax.LazyCheckpointHandler()).restore(
        epath.Path(tmp_path / "c"), args=lazy_orbax.args.LazyRestore(tree, args)
    )
    assert all(leaf.flags.writeable and leaf.base is None for leaf in found.values())
    assert_same(found, tree)


def test_pieces_that_are_not_chunks_are_verified(tmp_path):
    tree = {"a": on_mesh(random_array(RNG, (64, 64), np.float32), mesh(4), "a")}
    args = {"a": ocp.SaveArgs(chunk_byte_size=1024)}
    handler = lazy_orbax.LazyCheckpointHandler(use_ocdbt=False)
    ocp.Checkpointer(handler).save(
        epath.Path(tmp_path / "c"), args=lazy_orbax.args.LazySave(tree, args)
    )
    wanted = arguments(tree, TARGETS["axis 1"]())
    found, timeline = restored(tmp_path / "c", tree, wanted)
    assert timeline.all_by_orbax is None
    assert_same(found, tree)
    chunk = next(p for p in (tmp_path / "c" / "a").iterdir() if p.name[0] != ".")
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="leaf a"):
        restored(tmp_path / "c", tree, wanted)


def test_a_restore_that_fails_has_a_timeline_with_the_error(tmp_path):
    tree = state()
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    seen = []
    handler = lazy_orbax.LazyCheckpointHandler(options=LazyOptions(on_restore=seen.append))
    wrong = {**tree, "odd": jax.ShapeDtypeStruct((7, 6), np.float32)}
    args = arguments(tree, TARGETS["same"]())
    args["odd"] = dataclasses.replace(args["odd"], global_shape=(7, 6), shape=(7, 6))
    with pytest.raises(RestoreError, match="odd.*found \\[7, 5\\], wanted \\[7, 6\\]"):
        ocp.Checkpointer(handler).restore(
            epath.Path(tmp_path / "c"), args=lazy_orbax.args.LazyRestore(wrong, args)
        )
    assert isinstance(seen[0].error, RestoreError)
    assert seen[0].requests == seen[0].bytes_read == 0


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<i8"])
@pytest.mark.parametrize("name", ["ours", "stock", "stock, plain Zarr"])
def test_numpy_targets_of_the_other_byte_order_are_restored_as_by_stock(tmp_path, dtype, name):
    make, keywords = FORMATS[name]
    tree = {"w": np.arange(300, 340).astype(dtype), "one": np.array(300, dtype)}
    args = lazy_orbax.args.LazySave if "ours" in name else ocp.args.PyTreeSave
    saved(tmp_path / "c", make(**keywords), tree, args)
    wanted = ocp.checkpoint_utils.construct_restore_args(tree)
    found, timeline = restored(tmp_path / "c", tree, wanted)
    assert timeline.all_by_orbax is None
    assert_same(found, by_stock(tmp_path / "c", tree, wanted))
    np.testing.assert_array_equal(found["w"], tree["w"])


def descriptors():
    """The open files of this process, by what they are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # That of the listing itself.
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(one for one in found if not one.startswith(("anon_inode", "socket", "pipe")))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_what_the_progress_bar_raises_ends_a_restore_and_leaves_nothing(tmp_path, error):
    tree = state()
    saved(tmp_path / "c", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    open_before, seen = descriptors(), []

    def progress(done_bytes, wanted_bytes):
        assert not gc.isenabled()
        raise error("stop")

    options = LazyOptions(on_restore=seen.append, on_restore_progress=progress)
    handler = lazy_orbax.LazyCheckpointHandler(options=options)
    args = lazy_orbax.args.LazyRestore(tree, arguments(tree, TARGETS["axis 1"]()))
    with pytest.raises(error, match="^stop"):
        handler.restore(epath.Path(tmp_path / "c"), args=args)
    assert gc.isenabled()
    assert descriptors() == open_before
    assert isinstance(seen[0].error, error)
    assert seen[0].all_by_orbax is None
    assert_same(handler_restores(tmp_path / "c", args), tree)


def handler_restores(directory, args):
    return lazy_orbax.LazyCheckpointHandler().restore(epath.Path(directory), args=args)


def test_restores_at_once_and_a_save_beside_them_do_not_disturb_each_other(tmp_path):
    trees = [state() for _ in range(3)]
    for i, tree in enumerate(trees):
        saved(tmp_path / f"{i}", lazy_orbax.LazyCheckpointHandler(), tree, lazy_orbax.args.LazySave)
    names = ["same", "axis 1", "2 x 2"]
    args = [
        lazy_orbax.args.LazyRestore(tree, arguments(tree, TARGETS[name]()))
        for tree, name in zip(trees, names, strict=True)
    ]
    handler = lazy_orbax.LazyCheckpointHandler()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        saving = pool.submit(saved, tmp_path / "new", handler, trees[0], lazy_orbax.args.LazySave)
        running = [
            pool.submit(handler.restore, epath.Path(tmp_path / f"{i}"), args[i])
            for i in (0, 1, 2, 0, 1, 2)
        ]
        for future, i in zip(running, (0, 1, 2, 0, 1, 2), strict=True):
            assert_same(future.result(), trees[i])
        saving.result()
    assert gc.isenabled()
    assert_same(handler_restores(tmp_path / "new", args[0]), trees[0])
