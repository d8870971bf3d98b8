"""`merge` against NumPy, over formats, meshes and dtypes; what it refuses; what it leaves."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh
from etils import epath

import lazy_orbax
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    MergeError,
    OptionError,
)

FACTORS = (0.25, -0.5, 1.3)
ZARR3_FILES = {"use_ocdbt": False, "use_zarr3": True}
FORMATS = {
    "ocdbt": {},
    "zarr3 in ocdbt": {"use_zarr3": True},
    "zarr files": {"use_ocdbt": False},
    "zarr3 files": ZARR3_FILES,
}


def normal(seed, shape, dtype):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("a", "b")[: len(shape)])


def state(i, place=lambda x: x):
    return {
        "params": {
            "w": place(normal(i, (8, 12), np.float32)),
            "half": place(normal(i + 10, (16, 4), ml_dtypes.bfloat16)),
        },
        "wide": normal(i + 20, (3,), np.float64),
        "rate": 0.125 * (i + 1),
        "step": jnp.int32(7),
        "key": jax.random.key(5),
        "nothing": [None, {}],
    }


def place_of(i):
    """Another mesh, and another spec, for each source."""
    places = [(mesh(4), ("a",)), (mesh(2, 2), ("b", "a")), (mesh(8), (None, "a"))]
    on, spec = places[i % len(places)]
    return lambda x: on_mesh(x, on, *spec) if x.shape[1] % 8 == 0 or i % 3 < 2 else x


def saved(directory, tree, *, stock=False, **keywords):
    handler = (ocp.PyTreeCheckpointHandler if stock else lazy_orbax.pytree_handler)(**keywords)
    ocp.Checkpointer(handler).save(epath.Path(directory), args=ocp.args.PyTreeSave(tree))
    return directory


def reference(arrays, factors=FACTORS, total=np.float32, dtype=None):
    total = np.float64 if arrays[0].dtype == np.float64 else total
    acc = total(factors[0]) * arrays[0].astype(total)
    for array, factor in zip(arrays[1:], factors[1:], strict=True):
        acc = acc + total(factor) * array.astype(total)
    return acc.astype(dtype or arrays[0].dtype)


def merged_trees(trees, **keywords):
    def one(*leaves):
        if isinstance(leaves[0], float):
            return reference(np.array(leaves)[:, None], **keywords).item()
        if not jnp.issubdtype(getattr(leaves[0], "dtype", int), jnp.floating):
            return leaves[0]
        return reference([np.asarray(leaf) for leaf in leaves], **keywords)

    return jax.tree.map(one, *trees)


def by_stock(path, target):
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(path, item=target, restore_args=arguments)


def restored(path):
    tree = lazy_orbax.load(path)
    tree["key"] = jax.random.wrap_key_data(tree["key"])
    tree["nothing"] = [None, {}]
    return tree


def test_a_leaf_may_be_called_as_a_directory_of_orbax(tmp_path):
    arrays = [normal(i, (8,), np.float32) for i in range(2)]
    paths = [
        saved(tmp_path / str(i), {"array_metadatas": array}, stock=True, use_ocdbt=False)
        for i, array in enumerate(arrays)
    ]
    lazy_orbax.merge(paths, FACTORS[:2], tmp_path / "out")
    found = lazy_orbax.load(tmp_path / "out")["array_metadatas"]
    assert_same(found, reference(arrays, FACTORS[:2]))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_imaginary_parts_are_kept_whatever_the_dtype_and_the_order(tmp_path, dtype):
    real = np.arange(3, dtype=np.float32)
    imaginary = (real + 2j).astype(np.complex64)
    trees = [imaginary, imaginary] if dtype is None else [real, imaginary]
    paths = [saved(tmp_path / str(i), {"x": tree}) for i, tree in enumerate(trees)]
    lazy_orbax.merge(paths, (0.5, 0.5), tmp_path / "out", dtype=dtype)
    found = lazy_orbax.load(tmp_path / "out")["x"]
    assert_same(found, np.complex64(0.5) * trees[0] + np.complex64(0.5) * imaginary)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("stock", [False, True])
def test_the_result_is_that_of_numpy_whatever_the_formats_and_meshes(tmp_path, first, stock):
    formats = [FORMATS[first], *(f for name, f in FORMATS.items() if name != first)]
    trees = [state(i, place_of(i)) for i in range(3)]
    sources = [
        saved(tmp_path / str(i), tree, stock=stock and i != 1, **keywords)
        for i, (tree, keywords) in enumerate(zip(trees, formats))
    ]
    found = lazy_orbax.merge(sources, FACTORS, tmp_path / "out")
    wanted = merged_trees(trees)
    assert_same(restored(tmp_path / "out"), wanted)
    assert lazy_orbax.verify(tmp_path / "out").ok
    assert (found.n_averaged, found.n_copied) == (4, 2)
    tree = by_stock(tmp_path / "out", trees[0])
    assert_same(np.asarray(tree["params"]["half"]), wanted["params"]["half"])
    assert tree["params"]["w"].sharding == trees[0]["params"]["w"].sharding
    assert tree["rate"] == wanted["rate"]


def test_a_step_of_a_manager_becomes_one_with_lineage(tmp_path):
    trees = [state(i) for i in range(3)]
    with ocp.CheckpointManager(
        tmp_path / "run", item_handlers=lazy_orbax.standard_handler()
    ) as manager:
        for i, tree in enumerate(trees):
            manager.save(i, args=ocp.args.StandardSave(tree), custom_metadata={"loss": 1})
    lazy_orbax.merge(
        [tmp_path / "run" / str(i) for i in range(3)], "cosine", tmp_path / "all" / "9"
    )
    with ocp.CheckpointManager(
        tmp_path / "all", item_handlers=ocp.StandardCheckpointHandler()
    ) as manager:
        assert manager.all_steps() == [9]
        tree = manager.restore(9, args=ocp.args.StandardRestore(trees[0]))
        lineage = manager.metadata(9).custom_metadata["lazy_orbax_merge"]
        item = manager.item_metadata(9)
    numbers = lazy_orbax.merge_coefficients("cosine", 3)
    wanted = merged_trees(trees, factors=numbers)
    assert_same(tree["params"]["w"], wanted["params"]["w"])
    assert [source["step"] for source in lineage["sources"]] == [0, 1, 2]
    assert [source["coefficient"] for source in lineage["sources"]] == list(numbers)
    assert len({source["digest"] for source in lineage["sources"]}) == 3
    assert (lineage["schedule"], lineage["accumulator"]) == ("cosine", "float32")
    assert item["params"]["w"].shape == (8, 12)
    assert lazy_orbax.verify(tmp_path / "all").ok


def test_a_source_without_digests_says_so_in_the_lineage(tmp_path):
    saved(tmp_path / "a", {"w": np.ones(3, np.float32)}, stock=True)
    lazy_orbax.merge([tmp_path / "a"] * 2, "uniform", tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "_METADATA").read_text())
    (first, _) = metadata["custom_metadata"]["lazy_orbax_merge"]["sources"]
    assert first["digest"] is None


@pytest.mark.parametrize("keywords", [{}, ZARR3_FILES], ids=["ocdbt", "zarr3"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.float64, jnp.float8_e4m3fn])
@pytest.mark.parametrize("accumulator", ["float32", "float64"])
def test_dtypes_may_differ_if_that_of_the_result_is_given(tmp_path, keywords, dtype, accumulator):
    a, b = normal(1, (8, 6), np.float32), normal(2, (8, 6), ml_dtypes.bfloat16)
    saved(tmp_path / "a", {"w": a}, **keywords)
    saved(tmp_path / "b", {"w": b})
    with pytest.raises(MergeError, match="leaf w: found float32 in source 0, bfloat16 in source 1"):
        lazy_orbax.merge([tmp_path / "a", tmp_path / "b"], "uniform", tmp_path / "out")
    lazy_orbax.merge(
        [tmp_path / "a", tmp_path / "b"],
        [0.7, 0.3],
        tmp_path / "out",
        dtype=dtype,
        accumulator=accumulator,
    )
    wide = accumulator == "float64" or dtype == np.float64
    total = np.float64 if wide else np.float32
    wanted = reference([a, b], [0.7, 0.3], total, jnp.dtype(dtype))
    assert_same(lazy_orbax.load(tmp_path / "out")["w"], wanted)
    found = by_stock(tmp_path / "out", {"w": np.zeros((8, 6), jnp.dtype(dtype))})
    assert_same(found["w"], wanted)
    assert lazy_orbax.verify(tmp_path / "out").ok


def test_what_is_no_float_is_equal_or_taken_from_a_named_source(tmp_path):
    trees = [
        {"w": np.full(4, i, np.float32), "n": np.arange(3) + i, "on": i > 0, "text": f"run {i}"}
        | {"key": jax.random.key(i), "same": 3}
        for i in range(2)
    ]
    sources = [saved(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
    with pytest.raises(MergeError) as caught:
        lazy_orbax.merge(sources, "uniform", tmp_path / "out")
    assert caught.value.problems == ("leaf text: found 'run 0' in source 0, 'run 1' in source 1",)
    without_text = [
        saved(tmp_path / f"t{i}", {k: v for k, v in tree.items() if k != "text"})
        for i, tree in enumerate(trees)
    ]
    with pytest.raises(MergeError) as caught:
        lazy_orbax.merge(without_text, "uniform", tmp_path / "out")
    assert [text.split(":")[0] for text in sorted(caught.value.problems)] == [
        "leaf key",
        "leaf n",
        "leaf on",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "t0", "t1"]
    lazy_orbax.merge(sources, "uniform", tmp_path / "out", others=-1)
    found = lazy_orbax.load(tmp_path / "out", trees[1])
    assert_same(found, {**trees[1], "w": np.full(4, 0.5, np.float32)})
    assert lazy_orbax.verify(tmp_path / "out").ok


def test_every_misfit_is_named_and_ten_are_shown(tmp_path):
    first = {f"x{i:02}": np.ones(2, np.float32) for i in range(12)}
    other = {f"x{i:02}": np.ones(3, np.float32) for i in range(12)}
    first |= {"mine": 1, "kind": 1, "text": "a", "n": np.ones(2, np.int32)}
    other |= {"theirs": 1, "kind": "b", "text": "a", "n": np.ones(2, np.float32)}
    sources = [saved(tmp_path / "a", first), saved(tmp_path / "b", other)]
    with pytest.raises(MergeError) as caught:
        lazy_orbax.merge(sources, "uniform", tmp_path / "out")
    problems = "\n".join(caught.value.problems)
    for said in (
        "leaf x11: found [2] in source 0, [3] in source 1",
        "leaf mine: found in source 0, and not in source 1",
        "leaf theirs: found in source 1, and not in source 0",
        "leaf kind: found scalar in source 0, string in source 1",
        "leaf n: found int32 in source 0, float32 in source 1",
    ):
        assert said in problems
    assert len(caught.value.problems) == 16
    assert str(caught.value).endswith("and 6 more")
    assert not (tmp_path / "out").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def test_a_corrupt_source_is_refused_and_nothing_is_left(tmp_path):
    tree = {"w": np.ones((4, 4), np.float32)}
    saved(tmp_path / "a", tree, **ZARR3_FILES)
    saved(tmp_path / "b", tree, **ZARR3_FILES)
    flip(tmp_path / "b" / "w" / "c" / "0" / "0")
    with pytest.raises(CorruptCheckpointError, match="leaf w"):
        lazy_orbax.merge([tmp_path / "a", tmp_path / "b"], "uniform", tmp_path / "out")
    (tmp_path / "b" / "w" / "c" / "0" / "0").unlink()
    with pytest.raises(CorruptCheckpointError, match="leaf w"):
        lazy_orbax.merge([tmp_path / "a", tmp_path / "b"], "uniform", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_malformed_source_is_refused(tmp_path):
    saved(tmp_path / "a", {"w": np.ones(4, np.float32)}, **ZARR3_FILES)
    (tmp_path / "a" / "_METADATA").write_text('{"tree_metadata": 3}')
    for verify in (False, True):
        with pytest.raises((MalformedCheckpointError, CorruptCheckpointError)):
            lazy_orbax.merge([tmp_path / "a"], "uniform", tmp_path / "out", verify=verify)


def test_a_step_whose_metadata_are_malformed_is_refused(tmp_path):
    saved(tmp_path / "a", {"w": np.ones(4, np.float32)}, stock=True)
    (tmp_path / "a" / "_CHECKPOINT_METADATA").write_text("[1]")
    with pytest.raises(MalformedCheckpointError, match="_CHECKPOINT_METADATA"):
        lazy_orbax.merge([tmp_path / "a"], "uniform", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_small_budget_makes_no_difference(tmp_path):
    trees = [{"w": on_mesh(normal(i, (64, 64, 256), np.float32), mesh(8), "a")} for i in range(2)]
    sources = [saved(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
    seen = []
    lazy_orbax.merge(
        sources,
        [1, 2],
        tmp_path / "out",
        host_bytes=2**20,
        on_progress=lambda *told: seen.append(told),
    )
    wanted = reference([np.asarray(tree["w"]) for tree in trees], [1, 2])
    assert_same(lazy_orbax.load(tmp_path / "out")["w"], wanted)
    assert seen[-1][0] == seen[-1][1] == 2 * 2 * wanted.nbytes / 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("form", FORMATS)
def test_a_chunk_that_several_parts_of_a_unit_want_is_read_once(tmp_path, form):
    arrays = [normal(i, (1, 2**17), np.float16) for i in range(3)]
    paths = []
    for i, array in enumerate(arrays):
        cut = {"w": ocp.SaveArgs(chunk_byte_size=60_000 if i == 0 else None)}
        args = ocp.args.PyTreeSave({"w": array}, save_args=cut)
        with ocp.Checkpointer(lazy_orbax.pytree_handler(**FORMATS[form])) as checkpointer:
            checkpointer.save(tmp_path / f"{i}", args=args)
        paths.append(tmp_path / f"{i}")
    lazy_orbax.merge(paths, FACTORS, tmp_path / "merged", host_bytes=2**20)
    assert_same(lazy_orbax.load(tmp_path / "merged")["w"], reference(arrays))


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"sources": "one"}, "several checkpoints"),
        ({"sources": []}, "no sources"),
        ({"sources": ["nowhere"]}, "holds no checkpoint"),
        ({"coefficients": [1, 2]}, "2 coefficients for 1 sources"),
        ({"coefficients": "sine"}, "no schedule"),
        ({"out": 3}, "must be the path"),
        ({"accumulator": "float16"}, "neither"),
        ({"dtype": "int8"}, "holds no averages"),
        ({"dtype": "nothing"}, "is no dtype"),
        ({"others": 1}, "position of one of the 1"),
        ({"host_bytes": 10}, "at least"),
        ({"out": "source"}, "is there already"),
    ],
)
def test_what_is_wrong_is_said_at_once(tmp_path, monkeypatch, keywords, said):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "source", {"w": np.ones(2, np.float32)})
    given = {"sources": ["source"], "coefficients": "uniform", "out": "out"} | keywords
    with pytest.raises(OptionError, match=said):
        lazy_orbax.merge(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
