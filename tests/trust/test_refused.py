"""Dangerous checkpoints are refused with an error that says what and where; harmless ones pass."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numcodecs
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from equipment.trees import abstract, assert_same
from etils import epath
from trust import ocdbt_codec

import lazy_orbax
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    RestoreError,
    TreeError,
)
from lazy_orbax.integrity import digest_file
from lazy_orbax.trust import malformed, ocdbt_decode

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("restores_that_fail"),
]
FORMS = {
    "ocdbt": {},
    "zarr3": {"use_zarr3": True},
    "plain": {"use_ocdbt": False},
    "plain zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


def tree():
    return {"a": {"w": jnp.arange(32, dtype=jnp.float32)}, "list": [jnp.ones(3), 4], "s": "text"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid")
    for name, keywords in FORMS.items():
        handler, directory = lazy_orbax.pytree_handler(**keywords), epath.Path(root / name)
        directory.mkdir()
        handler.save(directory, args=ocp.args.PyTreeSave(tree()))
        handler.finalize(directory)
        handler.close()
        # Who made a dangerous checkpoint had no digests of it, or made those as well.
        shutil.rmtree(directory / digest_file.DIRECTORY)
    return root


@pytest.fixture
def copy(valid, tmp_path):
    """Copies a valid checkpoint of a form, for the test to spoil."""
    return lambda form: pathlib.Path(shutil.copytree(valid / form, tmp_path / form))


def restore(directory, **keywords):
    args = ocp.args.PyTreeRestore(**keywords)
    return lazy_orbax.pytree_handler().restore(epath.Path(directory), args=args)


def refused(directory, *texts, **keywords):
    """Asserts that a checkpoint is refused, by an error with these texts."""
    with pytest.raises(MalformedCheckpointError) as caught:
        restore(directory, **keywords)
    for text in texts:
        assert text in str(caught.value), caught.value
    assert len(str(caught.value)) < 2000


def change(file, action):
    content = json.loads(file.read_text())
    action(content)
    file.write_text(json.dumps(content))


def change_array(directory, name, **fields):
    """Changes what an array declares, wherever that is stored."""
    key = f"{name}/{'zarr.json' if 'zarr3' in str(directory) else '.zarray'}"
    if (directory / key).exists():
        change(directory / key, lambda metadata: metadata.update(fields))
        return
    base = {"driver": "ocdbt", "base": f"file://{directory}/"}
    stored = ts.KvStore.open(base).result()
    stored[key] = json.dumps({**json.loads(stored[key]), **fields}).encode()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_valid_is_restored(form, valid):
    assert_same(restore(valid / form), tree())


@pytest.mark.parametrize("form", ["plain", "ocdbt"])
def test_links_to_files_elsewhere_are_followed(form, copy, tmp_path):
    """So are the checkpoints in a cache of downloaded models."""
    directory, blobs = copy(form), tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate([f for f in directory.rglob("*") if f.is_file()]):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert_same(restore(directory), tree())


# Names and trees.


def entries(metadata):
    return metadata["tree_metadata"]


def rename(position, name):
    def action(metadata):
        entry = next(iter(entries(metadata).values()))
        entry["key_metadata"][position]["key"] = name

    return action


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/../../b"])
def test_a_name_that_leaves_the_directory(name, copy, tmp_path):
    directory = copy("plain")
    shutil.copytree(directory / "a.w", tmp_path / "elsewhere")
    metadata = directory / "_METADATA"
    change(metadata, lambda m: entries(m)["('a', 'w')"]["key_metadata"].pop(0))
    change(metadata, lambda m: entries(m)["('a', 'w')"]["key_metadata"][0].update(key=name))
    refused(directory, "_METADATA", name, "out of the directory")


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda m: m.update(tree_metadata=[]), "tree_metadata"),
        (lambda m: m.update(use_ocdbt="yes"), "use_ocdbt"),
        (lambda m: entries(m)["('s',)"].pop("value_metadata"), "value_metadata"),
        (lambda m: entries(m)["('s',)"]["value_metadata"].update(value_type=3), "value_type"),
        (lambda m: entries(m)["('s',)"]["value_metadata"].update(write_shape=[-1]), "write_shape"),
        (lambda m: entries(m)["('s',)"]["key_metadata"][0].update(key_type=9), "key_type"),
        (
            lambda m: entries(m)["('s',)"].update(
                key_metadata=[{"key": "x", "key_type": 2}] * 5000
            ),
            "5000 levels",
        ),
        (
            lambda m: entries(m)["('list', '0')"]["key_metadata"][1].update(key="1" * 12),
            "position",
        ),
        (lambda m: entries(m)["('list', '0')"]["key_metadata"][1].update(key="-1"), "position"),
        (
            lambda m: entries(m)["('list', '0')"]["key_metadata"][1].update(key_type=2),
            "one kind",
        ),
        (lambda m: entries(m)["('list', '1')"]["key_metadata"][1].update(key="2"), "gaps"),
        (lambda m: entries(m)["('s',)"]["key_metadata"][0].update(key="\ud800"), "ud800"),
        (lambda m: entries(m)["('s',)"].update(key_metadata=[]), "other leaves"),
    ],
)
def test_metadata_that_makes_no_tree(action, text, copy):
    directory = copy("ocdbt")
    change(directory / "_METADATA", action)
    refused(directory, "_METADATA", text)


@pytest.mark.parametrize("found", [3, True, ["x"], {"a": 1}])
def test_a_kind_of_keys_that_is_no_name(found, copy):
    file = "array_metadatas/process_0"
    directory = copy("ocdbt")
    action = {"ext_metadata": {"random_key_impl": found}}
    change(directory / file, lambda m: m["array_metadatas"][0]["array_metadata"].update(action))
    refused(directory, file)


@pytest.mark.parametrize(
    "name", ["_METADATA", "_sharding", "_strings.json", "array_metadatas/process_0"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"a": NaN', b"\xff", b"[" * 10**6, b'{"a":' * 5000 + b"1" + b"}" * 5000],
)
def test_files_that_are_no_json_object(name, content, copy):
    directory = copy("ocdbt")
    (directory / name).write_bytes(content)
    refused(directory, name)


def test_a_file_of_metadata_that_is_too_large(copy, monkeypatch):
    directory = copy("ocdbt")
    monkeypatch.setattr(malformed, "_LEAST_JSON_BYTES", 2**20)
    monkeypatch.setattr(malformed, "memory_bytes", lambda: 2**28)
    change(directory / "_METADATA", lambda m: m.update(custom_metadata="x" * 2**21))
    refused(directory, "_METADATA", f"more than {2**20} bytes")


@pytest.mark.parametrize(
    ("sharding", "text"),
    [
        ({"sharding_type": 5}, "sharding_type"),
        ({"sharding_type": "NamedSharding", "shape": ["x"]}, "shape"),
        ({"sharding_type": "NamedSharding", "shape": [1], "axis_names": "x"}, "axis_names"),
        ({"sharding_type": "SingleDeviceSharding"}, "device_str"),
        (
            {
                "sharding_type": "NamedSharding",
                "shape": [1],
                "axis_names": ["x"],
                "partition_spec": [],
                "axis_types": ["AxisType.New"],
            },
            "axis_types",
        ),
    ],
)
def test_shardings(sharding, text, copy):
    directory = copy("ocdbt")
    change(directory / "_sharding", lambda m: m.update({next(iter(m)): json.dumps(sharding)}))
    refused(directory, "_sharding", text)


def test_a_sharding_that_nobody_reads_is_not_looked_at(copy):
    directory, target = copy("ocdbt"), abstract(tree())
    (directory / "_sharding").write_text("")
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    restored = restore(directory, item=target, restore_args=restore_args)
    # Leaves that are no arrays have no sharding, and need none.
    assert_same(restored, tree())


# Sizes.


@pytest.mark.parametrize("form", ["ocdbt", "plain"])
def test_more_than_the_machine_holds(form, copy):
    directory = copy(form)
    change_array(directory, "a.w", shape=[2**50], chunks=[2**20])
    refused(directory, "a.w", str(2**52 + 20), str(malformed.memory_bytes()), "target")
    target = abstract(tree())
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with pytest.raises(RestoreError, match=r"\['a'\]\['w'\]: found \[1125899906842624\]"):
        restore(directory, item=target, restore_args=restore_args)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"shape": [-1]}, "shape"),
        ({"shape": [2**70]}, "shape"),
        ({"shape": [1.5]}, "shape"),
        ({"shape": [1] * 40, "chunks": [1] * 40}, "at most 32"),
        ({"shape": [True]}, "shape"),
        ({"chunks": [0]}, "chunks"),
        ({"chunks": [2**40]}, "within the shape"),
        ({"chunks": [8, 8]}, "1 dimensions"),
        ({"dtype": "|O"}, "no objects"),
        ({"dtype": [["a", "<f4"]]}, "no structures"),
        ({"dtype": "|V99"}, "no objects"),
        ({"dtype": "<f99"}, "at most 16 bytes"),
        ({"compressor": {"id": "blosc"}}, "blosc"),
        ({"compressor": {"id": "pickle"}}, "pickle"),
        ({"filters": [{"id": "pickle"}]}, "filters"),
        ({"shape": [2**30], "chunks": [1], "dtype": "|i1"}, "chunks declared"),
    ],
)
def test_what_an_array_may_not_declare(fields, text, copy):
    for form in ("ocdbt", "plain"):
        directory = copy(form)
        change_array(directory, "a.w", **fields)
        refused(directory, text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"data_type": "string"}, "dtype"),
        ({"chunk_grid": {}}, "configuration"),
        ({"codecs": [{"name": "blosc"}]}, "blosc"),
        ({"codecs": None}, "codecs"),
    ],
)
def test_what_an_array_of_zarr3_may_not_declare(fields, text, copy):
    directory = copy("plain zarr3")
    change_array(directory, "a.w", **fields)
    refused(directory, "a.w/zarr.json", text)


@pytest.mark.parametrize("form", ["ocdbt", "plain"])
def test_of_two_descriptions_the_larger_counts(form, copy):
    directory = copy(form)
    large = {"shape": [2**50], "chunk_grid": {"configuration": {"chunk_shape": [2**20]}}}
    content = {"zarr_format": 3, "codecs": [], "data_type": "float32", **large}
    if form == "plain":
        (directory / "a.w" / "zarr.json").write_text(json.dumps(content))
    else:
        base = {"driver": "ocdbt", "base": f"file://{directory}/"}
        ts.KvStore.open(base).result()["a.w/zarr.json"] = json.dumps(content).encode()
    refused(directory, str(2**52 + 20))


@pytest.mark.parametrize("form", ["plain", "plain zarr3"])
def test_a_sparse_chunk(form, copy):
    directory = copy(form)
    os.truncate(directory / "a.w" / ("0" if form == "plain" else "c/0"), 2**40)
    refused(directory, str(2**40))


def test_a_long_value_in_ocdbt(copy):
    directory = copy("ocdbt")
    base = {"driver": "ocdbt", "base": f"file://{directory}/"}
    ts.KvStore.open(base).result()["a.w/0"] = bytes(2**20)
    refused(directory, "a.w/0", str(2**20))


# Files that are none.


@pytest.mark.parametrize("form", ["ocdbt", "plain"])
@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "nowhere"])
def test_special_files(kind, form, copy):
    for name in ("_METADATA", "checkpoint", "extra/0"):
        directory = copy(form)
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(file)
        else:
            places = {"device": "/dev/zero", "loop": file.name, "nowhere": "/no/such/file"}
            file.symlink_to(places[kind])
        refused(directory, name)
        shutil.rmtree(directory)


def test_a_link_back_up_is_walked_once(copy):
    directory = copy("ocdbt")
    for name in ("one", "two"):
        (directory / "d" / name).symlink_to(directory)
    assert_same(restore(directory), tree())


# OCDBT.


def test_a_data_file_elsewhere(copy, tmp_path):
    directory = copy("ocdbt")
    file, offset, length, _ = ocdbt_codec.root_of(directory)
    node = file.read_bytes()[offset : offset + length]
    ocdbt_codec.put_root(directory, node, name=b"../stolen")
    refused(directory, "manifest.ocdbt", "../stolen")


@pytest.mark.parametrize("place", ["root", "manifest"])
@pytest.mark.parametrize("count", [6 * 10**6, 60 * 10**6])
def test_a_node_that_decodes_to_much_more(place, count, copy):
    directory = copy("ocdbt")
    manifest = directory / "manifest.ocdbt"
    old = ocdbt_codec.content(manifest.read_bytes())
    zeros = ocdbt_codec.varint(count) + bytes(3 * count)
    if place == "root":
        body = ocdbt_codec.compressed(b"\0" + zeros)
        node = ocdbt_codec.container(ocdbt_codec.NODE_MAGIC, body, is_compressed=True)
        ocdbt_codec.put_root(directory, node)
    else:
        body = ocdbt_codec.compressed(old[: ocdbt_codec.config_bytes(old)] + zeros)
        magic = ocdbt_codec.MANIFEST_MAGIC
        manifest.write_bytes(ocdbt_codec.container(magic, body, is_compressed=True))
    refused(directory, "decode to")


def test_the_bound_on_a_node_holds_for_what_zstd_writes():
    rng = np.random.default_rng(0)
    for length in (0, 1, 1000, 2**17 + 1, 2**20):
        for data in (
            bytes(length),
            rng.bytes(length),
            rng.integers(0, 4, length, np.uint8).tobytes(),
        ):
            for codec in (numcodecs.Zstd(1), numcodecs.Zstd(9, checksum=True)):
                encoded = bytes(codec.encode(data))
                assert ocdbt_decode.decoded_bytes(encoded) >= length
                assert ocdbt_decode.decoded_bytes(encoded) <= length + 2**18


# The other ways in.


def test_every_way_to_restore_looks_first(copy):
    directory = epath.Path(copy("ocdbt"))
    (directory / "checkpoint").unlink(missing_ok=True)
    os.mkfifo(directory / "checkpoint")
    for handler, args in (
        (lazy_orbax.pytree_handler(), ocp.args.PyTreeRestore(transforms={}, item=tree())),
        (lazy_orbax.standard_handler(), ocp.args.StandardRestore(abstract(tree()["list"]))),
        (lazy_orbax.standard_handler(), ocp.args.StandardRestore()),
        (lazy_orbax.LazyCheckpointHandler(), lazy_orbax.args.LazyRestore()),
    ):
        with pytest.raises(MalformedCheckpointError, match="special file"):
            handler.restore(directory, args=args)
        with pytest.raises(MalformedCheckpointError, match="special file"):
            handler.metadata(directory)


def test_a_step_of_a_manager(tmp_path):
    handler = lazy_orbax.standard_handler()
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.StandardSave({"x": jnp.ones(4)}))
        manager.wait_until_finished()
        (tmp_path / "0" / "default" / "_METADATA").write_text("{}")
        with pytest.raises(CorruptCheckpointError, match="_METADATA: has 2 bytes") as caught:
            manager.restore(0, args=ocp.args.StandardRestore({"x": jnp.ones(4)}))
    assert isinstance(caught.value.__cause__, MalformedCheckpointError)


def test_a_directory_that_is_not_there_is_orbax_s_to_tell(tmp_path):
    with pytest.raises(FileNotFoundError):
        restore(tmp_path / "nothing")


def test_an_error_of_orbax_names_the_checkpoint(copy):
    directory = copy("ocdbt")
    change(
        directory / "_METADATA",
        lambda m: entries(m)["('s',)"]["value_metadata"].update(value_type="no such type"),
    )
    with pytest.raises(ValueError, match="no such type") as caught:
        restore(directory)
    assert str(directory) in "".join(caught.value.__notes__)


# No pickle.


def imported_or_called(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call):
            yield getattr(node.func, "id", getattr(node.func, "attr", ""))
            yield from (word.arg for word in node.keywords if word.arg)


def test_nothing_in_the_library_runs_what_it_reads():
    dangerous = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
    dangerous |= {"exec", "eval", "__import__", "allow_pickle"}
    files = list(pathlib.Path(lazy_orbax.__file__).parent.rglob("*.py"))
    found = {word for file in files for word in imported_or_called(file)}
    assert {"json", "open"} <= found
    assert not dangerous & found


LEVELS = sys.getrecursionlimit()
KINDS = {"dict": lambda inner: {"k": inner}, "tuple": lambda inner: (inner,)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [257, LEVELS // 2, LEVELS * 3 // 4])
def test_a_deep_tree_that_stock_restores_is_restored(levels, kind, tmp_path):
    tree = np.arange(3.0)
    for _ in range(levels):
        tree = KINDS[kind](tree)
    place = tmp_path / "item"
    with ocp.Checkpointer(lazy_orbax.standard_handler()) as ours:
        ours.save(place, args=ocp.args.StandardSave(tree))
        restored = ours.restore(place)
    with ocp.StandardCheckpointer() as stock:
        assert jax.tree.structure(stock.restore(place)) == jax.tree.structure(restored)
    np.testing.assert_array_equal(jax.tree.leaves(restored)[0], np.arange(3.0))
    assert lazy_orbax.verify(place).is_whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beyond", [-20, 200])
def test_a_tree_too_deep_for_python_is_refused_in_words(beyond, kind, tmp_path):
    tree = np.arange(3.0)
    for _ in range(LEVELS + beyond):
        tree = KINDS[kind](tree)
    handler, directory = lazy_orbax.LazyCheckpointHandler(), epath.Path(tmp_path / "item")
    directory.mkdir()
    with pytest.raises(TreeError, match=f"recursion limit of {LEVELS}"):
        handler.save(directory, args=lazy_orbax.args.LazySave(tree))
    assert list(directory.iterdir()) == []
    handler.close()


def test_no_limit_on_recursion_lets_a_tree_pass_that_would_end_the_process(copy):
    directory, limit = copy("ocdbt"), sys.getrecursionlimit()
    keys = [{"key": "x", "key_type": 2}] * 200_000
    change(directory / "_METADATA", lambda m: entries(m)["('s',)"].update(key_metadata=keys))
    try:
        sys.setrecursionlimit(10**6)
        refused(directory, "_METADATA", "200000 levels")
    finally:
        sys.setrecursionlimit(limit)
