"""`load`: NumPy anywhere, any tree and mesh, and trees that are made of others while reading."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh, random_array
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax import LazyOptions
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    OptionError,
    RestoreError,
    TransformError,
)
from lazy_orbax.transforms import (
    TransformMap,
    cast,
    drop,
    fuse,
    init,
    pad_to,
    rename,
    scale,
    split,
    stack,
    strip,
    transpose,
    unstack,
)

RNG = np.random.default_rng(2)


def mesh(*shape):
    n = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:n]).reshape(shape), ("a", "b")[: len(shape)])


def saved(directory, tree, *, stock=False, **keywords):
    handler = (ocp.PyTreeCheckpointHandler if stock else lazy_orbax.pytree_handler)(**keywords)
    ocp.Checkpointer(handler).save(epath.Path(directory), args=ocp.args.PyTreeSave(tree))
    return directory


def state():
    return {
        "params": {"w": on_mesh(random_array(RNG, (8, 12), np.float32), mesh(4), "a")},
        "list": [np.arange(3), 4, "a string", None, {}],
        "half": on_mesh(random_array(RNG, (8, 4), ml_dtypes.bfloat16), mesh(2, 2), "b", "a"),
        "key": jax.random.key(1),
        "lr": 0.5,
    }


@pytest.mark.parametrize("stock", [False, True])
def test_without_a_target_all_comes_as_numpy(tmp_path, stock):
    tree = state()
    found = lazy_orbax.load(saved(tmp_path / "c", tree, stock=stock))
    wanted = {**tree, "key": jax.random.key_data(tree["key"])}
    assert found["list"][2:] == ["a string", None, {}]
    assert (found["lr"], found["list"][1]) == (0.5, 4)
    for name in ("half", "key"):
        assert type(found[name]) is np.ndarray
        assert_same(found[name], np.asarray(wanted[name]))
    assert_same(found["params"]["w"], np.asarray(tree["params"]["w"]))


def test_it_looks_up_no_device_and_warns_of_no_sharding(tmp_path):
    saved(tmp_path / "c", {"w": on_mesh(np.ones((8, 4), np.float32), mesh(4), "a"), "n": 1})
    code = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import jax, lazy_orbax
def refused(*args, **kwargs): raise AssertionError("a device was looked up")
from jax._src import xla_bridge
xla_bridge.backends = xla_bridge.get_backend = refused
tree = lazy_orbax.load(sys.argv[1])
print(tree["w"].sum(), tree["n"])
"""
    environment = {**os.environ, "XLA_FLAGS": ""}  # Not the devices that saved.
    run = [sys.executable, "-c", code, str(tmp_path / "c")]
    found = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert found.stdout.split() == ["32.0", "1"], found.stderr


def test_a_target_says_what_comes_where_and_in_which_dtype(tmp_path):
    tree = state()
    tree["params"]["w"] = on_mesh(np.arange(96, dtype=np.float32).reshape(8, 12), mesh(4), "a")
    saved(tmp_path / "c", tree)
    place = NamedSharding(mesh(2, 2), P("a", "b"))
    like = {
        "params": {"w": jax.ShapeDtypeStruct((8, 12), jnp.bfloat16, sharding=place)},
        "list": [np.zeros(3, np.int32), 0, "", None, {}],
        "key": jax.random.key(0),
    }
    found = lazy_orbax.load(tmp_path / "c", like)
    assert found["params"]["w"].sharding == place
    assert_same(found["params"]["w"], np.asarray(tree["params"]["w"]).astype(ml_dtypes.bfloat16))
    assert_same(found["list"][0], np.arange(3, dtype=np.int32))
    assert found["list"][1:] == [4, "a string", None, {}]
    assert_same(found["key"], tree["key"])


def test_a_mesh_and_a_rule_place_every_array(tmp_path):
    tree = {"w": np.arange(16.0, dtype=np.float32).reshape(4, 4), "b": np.ones(3, np.float32)}
    saved(tmp_path / "c", tree)

    def rule(name, shape):
        return P("a") if len(shape) == 2 else P()

    found = lazy_orbax.load(tmp_path / "c", tree, mesh=mesh(4), rule=rule)
    assert found["w"].sharding == NamedSharding(mesh(4), P("a"))
    assert found["b"].sharding == NamedSharding(mesh(4), P())
    assert_same(jax.tree.map(np.asarray, found), tree)


def test_a_step_of_one_item_is_enough(tmp_path):
    manager = ocp.CheckpointManager(tmp_path, item_handlers={"state": lazy_orbax.pytree_handler()})
    tree = {"w": np.arange(4)}
    manager.save(7, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    manager.close()
    assert_same(lazy_orbax.load(tmp_path / "7"), tree)
    assert_same(lazy_orbax.load(str(tmp_path / "7" / "state")), tree)
    with pytest.raises(OptionError, match="is a run. Give one of its steps, such as .*/7"):
        lazy_orbax.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda d: (d / "nowhere",), OptionError, "holds no checkpoint"),
        (lambda d: (3,), OptionError, "path of a checkpoint: found 3"),
        (lambda d: (d / "c", {"x": np.zeros(3)}), RestoreError, "leaf x: found no such array"),
        (lambda d: (d / "c", {"w": np.zeros(3)}), RestoreError, r"found \[4\], wanted \[3\]"),
        (lambda d: (d / "c", {"w": 3}), RestoreError, r"found \[4\], wanted a number"),
        # In place of numbers Python would take what is stored for addresses.
        (lambda d: (d / "c", {"w": np.empty(4, object)}), RestoreError, "leaf w: found dtype obj"),
        (lambda d: (d / "c", {"w": object()}), RestoreError, "leaf w: found object"),
        (lambda d: (d / "c", {"w": "text"}), RestoreError, "leaf w: found no such string"),
        (lambda d: ({"a": d / "c"},), OptionError, "for transforms only"),
    ],
)
def test_bad_input_has_one_clear_error(tmp_path, arguments, error, message):
    saved(tmp_path / "c", {"w": np.arange(4)})
    with pytest.raises(error, match=message):
        lazy_orbax.load(*arguments(tmp_path))


@pytest.mark.parametrize("keywords", [{}, {"use_ocdbt": False}])
def test_a_changed_byte_is_noticed(tmp_path, keywords):
    tree = {"w": on_mesh(random_array(RNG, (64, 64), np.float32), mesh(4), "a")}
    saved(tmp_path / "c", tree, **keywords)
    content = np.asarray(tree["w"])[16:32].tobytes()
    for file in (tmp_path / "c").rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(content)) >= 0:
            changed = bytearray(file.read_bytes())
            changed[at + 7] ^= 4
            file.write_bytes(changed)
    with pytest.raises(CorruptCheckpointError, match=r"leaf w\[16:32"):
        lazy_orbax.load(tmp_path / "c")
    found = lazy_orbax.load(tmp_path / "c", options=LazyOptions(verify_restore=False))
    changed = found["w"].view(np.uint32) != np.asarray(tree["w"]).view(np.uint32)
    assert changed.sum() == 1


def layers(n=6):
    return {
        "params": {
            f"layer_{i}": {
                "kernel": on_mesh(random_array(RNG, (8, 16), np.float32), mesh(4), None, "a"),
                "bias": on_mesh(random_array(RNG, (16,), np.float32), mesh(4), "a"),
            }
            for i in range(n)
        },
        "embed": on_mesh(RNG.standard_normal((30, 8)).astype(np.float32), mesh(2), "a"),
    }


def abstract(tree, sharding=None):
    def one(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


@pytest.mark.parametrize("keywords", [{}, {"use_zarr3": True}, {"use_compression": True}])
@pytest.mark.parametrize("spec", [None, P(), P("a"), P(None, "a")])
def test_a_tree_is_stacked_renamed_padded_and_cast_while_it_is_read(tmp_path, keywords, spec):
    tree = layers()
    saved(tmp_path / "c", tree, **keywords)
    rules = TransformMap(
        [
            stack(r"params\.layer_(\d+)\.(kernel|bias)", r"model.layers.\2"),
            rename("embed", "model.embed"),
            pad_to(r"model\.embed", (32, 8), value=0),
            cast(r"model\.embed", jnp.bfloat16),
        ]
    )
    kernels = [np.asarray(tree["params"][f"layer_{i}"]["kernel"]) for i in range(6)]
    biases = [np.asarray(tree["params"][f"layer_{i}"]["bias"]) for i in range(6)]
    embed = np.zeros((32, 8), ml_dtypes.bfloat16)
    embed[:30] = np.asarray(tree["embed"]).astype(ml_dtypes.bfloat16)
    wanted = {
        "model": {
            "layers": {"kernel": np.stack(kernels), "bias": np.stack(biases)},
            "embed": embed,
        }
    }
    like = abstract(wanted)
    if spec is not None:
        place = NamedSharding(mesh(2), spec)
        like = abstract(wanted, place)
    seen = []
    options = LazyOptions(on_restore=seen.append)
    found = lazy_orbax.load(tmp_path / "c", like, transforms=rules, options=options)
    assert_same(jax.tree.map(np.asarray, found), wanted)
    assert seen[0].bytes_read <= 1.02 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + 64
    assert seen[0].transforms["rules"]


def test_layers_are_taken_out_of_a_stack_that_is_read_once(tmp_path):
    stacked = on_mesh(random_array(RNG, (24, 64, 32), np.float32), mesh(4), None, "a")
    saved(tmp_path / "c", {"layers": stacked})
    rules = TransformMap([unstack("layers", "layer_{layer}")])
    like = {f"layer_{i}": jax.ShapeDtypeStruct((64, 32), np.float32) for i in range(24)}
    seen = []
    options = LazyOptions(on_restore=seen.append)
    found = lazy_orbax.load(tmp_path / "c", like, transforms=rules, options=options)
    assert_same(found, {f"layer_{i}": np.asarray(stacked)[i] for i in range(24)})
    assert seen[0].bytes_read <= 1.02 * stacked.nbytes


def test_only_the_wanted_bytes_of_a_stack_are_read(tmp_path):
    stacked = on_mesh(random_array(RNG, (8, 512, 32), np.float32), mesh(4), "a")
    saved(tmp_path / "c", {"layers": stacked})
    rules = TransformMap([unstack("layers", "layer_{layer}"), drop("layer_[1-7]")])
    like = {"layer_0": jax.ShapeDtypeStruct((512, 32), np.float32)}
    seen = []
    options = LazyOptions(on_restore=seen.append)
    found = lazy_orbax.load(tmp_path / "c", like, transforms=rules, options=options)
    assert_same(found["layer_0"], np.asarray(stacked)[0])
    assert seen[0].bytes_read <= stacked.nbytes / 4  # The chunk it is in has two layers.


def test_parts_are_split_fused_turned_and_made(tmp_path):
    qkv = on_mesh(RNG.standard_normal((16, 24)).astype(np.float32), mesh(4), "a")
    tree = {"qkv": qkv, "a": np.arange(6.0).reshape(2, 3), "b": np.ones((1, 3))}
    tree |= {"vocabulary": np.arange(40.0).reshape(10, 4)}
    saved(tmp_path / "c", tree)
    rules = TransformMap(
        [
            split("qkv", ["q", "k", "v"], 1, [16, 4, 4]),
            transpose("k", (1, 0)),
            fuse(["a", "b"], "ab", 0),
            strip("vocabulary", (7, 4)),
            scale("q", 0.5),
            init("new", 3.0),
        ]
    )
    whole = np.asarray(qkv)
    wanted = {
        "q": whole[:, :16] * np.float32(0.5),
        "k": whole[:, 16:20].T,
        "v": whole[:, 20:],
        "ab": np.concatenate([tree["a"], tree["b"]]),
        "vocabulary": tree["vocabulary"][:7],
        "new": np.full((2, 2), 3, np.float32),
    }
    found = lazy_orbax.load(tmp_path / "c", abstract(wanted), transforms=rules)
    assert_same(found, wanted)


def test_two_checkpoints_make_one_tree(tmp_path):
    base = {"w": random_array(RNG, (8, 8), np.float32)}
    lora = {"w_a": random_array(RNG, (8, 2), np.float32)}
    paths = {"base": saved(tmp_path / "b", base), "lora": saved(tmp_path / "l", lora, stock=True)}
    rules = TransformMap([rename("w_a", "lora.w_a", source="lora")], sources=("base", "lora"))
    wanted = {"w": base["w"], "lora": {"w_a": lora["w_a"]}}
    assert_same(lazy_orbax.load(paths, abstract(wanted), transforms=rules), wanted)


def test_a_dry_run_prints_what_goes_where_and_reads_no_array(tmp_path):
    saved(tmp_path / "c", {"w": random_array(RNG, (64, 64), np.float32)})
    for file in (tmp_path / "c").rglob("d/*"):
        if file.stat().st_size >= 64 * 64 * 4:
            file.write_bytes(b"\0" * file.stat().st_size)
    like = {"x": jax.ShapeDtypeStruct((64, 64), np.float32)}
    plan = lazy_orbax.load(
        tmp_path / "c", like, transforms=TransformMap([rename("w", "x")]), dry_run=True
    )
    assert "x" in str(plan)
    assert plan.report["leaves"]["x"]["from"] == ["w"]


def test_rules_that_do_not_make_the_tree_are_an_error(tmp_path):
    saved(tmp_path / "c", {"w": np.arange(4), "v": np.arange(2)})
    like = {"x": np.arange(4)}
    with pytest.raises(TransformError, match="leaf v.*nobody wants it"):
        lazy_orbax.load(tmp_path / "c", like, transforms=TransformMap([rename("w", "x")]))


def test_a_changed_byte_is_noticed_through_transforms(tmp_path):
    stacked = on_mesh(random_array(RNG, (4, 64, 32), np.float32), mesh(4), None, "a")
    saved(tmp_path / "c", {"layers": stacked})
    content = np.asarray(stacked)[:, 16:32].tobytes()
    for file in (tmp_path / "c").rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(content)) >= 0:
            changed = bytearray(file.read_bytes())
            changed[at + 7] ^= 4
            file.write_bytes(changed)
    rules = TransformMap([unstack("layers", "layer_{layer}")])
    like = {f"layer_{i}": jax.ShapeDtypeStruct((64, 32), np.float32) for i in range(4)}
    with pytest.raises(CorruptCheckpointError, match="leaf layers"):
        lazy_orbax.load(tmp_path / "c", like, transforms=rules)


def test_a_manager_restores_through_transforms(tmp_path):
    manager = ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.LazyCheckpointHandler())
    tree = {"w": on_mesh(np.arange(32.0).reshape(8, 4), mesh(4), "a")}
    manager.save(3, args=lazy_orbax.args.LazySave(tree))
    manager.wait_until_finished()
    like = {"x": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh(2), P("a")))}
    args = lazy_orbax.args.LazyRestore(like, transforms=TransformMap([rename("w", "x")]))
    found = manager.restore(3, args=args)
    assert found["x"].sharding == like["x"].sharding
    assert_same(np.asarray(found["x"]), np.asarray(tree["w"]))
    wrong = lazy_orbax.args.LazyRestore(like, transforms=TransformMap([rename("v", "x")]))
    with pytest.raises(TransformError, match="it is about no leaf"):
        manager.restore(3, args=wrong)
    manager.close()


@pytest.mark.parametrize("dtype", [">u2", ">f4"])
@pytest.mark.parametrize("stock", [False, True])
def test_a_target_in_the_other_byte_order_has_the_numbers(tmp_path, dtype, stock):
    tree = {"w": np.arange(300, 340).astype(dtype)}
    directory = saved(tmp_path / "c", tree, stock=stock)
    found = lazy_orbax.load(directory, tree)["w"]
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert_same(found, tree["w"].astype(found.dtype))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("order", None),
        ("dimension_separator", True),
        ("compressor", {"id": "zstd", "level": 2**70}),
    ],
)
def test_metadata_of_an_unknown_form_is_refused(tmp_path, field, value):
    directory = saved(tmp_path / "c", {"w": np.arange(1000)}, stock=True, use_ocdbt=False)
    file = directory / "w" / ".zarray"
    metadata = json.loads(file.read_text())
    metadata.pop(field, None)
    file.write_text(json.dumps(metadata if value is None else {**metadata, field: value}))
    with pytest.raises((MalformedCheckpointError, CorruptCheckpointError), match="w"):
        lazy_orbax.load(directory)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_what_the_progress_bar_raises_ends_a_load(tmp_path, error):
    directory = saved(tmp_path / "c", state())

    def progress(done_bytes, wanted_bytes):
        raise error("stop")

    with pytest.raises(error, match="^stop"):
        lazy_orbax.load(directory, options=LazyOptions(on_restore_progress=progress))


@pytest.mark.parametrize("other", ["<i4", "<u4"])
@pytest.mark.parametrize("with_target", [False, True])
def test_the_same_bytes_as_other_numbers_are_noticed(tmp_path, other, with_target):
    tree = {"w": on_mesh(random_array(RNG, (16, 100), np.float32), mesh(2), "a")}
    directory = saved(tmp_path / "c", tree, use_ocdbt=False)
    file = directory / "w" / ".zarray"
    content = file.read_text()
    assert "<f4" in content
    file.write_text(content.replace("<f4", other))
    with pytest.raises(CorruptCheckpointError, match="leaf w.*saved was float32"):
        lazy_orbax.load(directory, tree if with_target else None)
    handler = lazy_orbax.pytree_handler()
    args = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
    with pytest.raises(CorruptCheckpointError, match="leaf w.*saved was float32"):
        handler.restore(epath.Path(directory), args=args)
