"""Arguments of save and restore: what they do with stock, they do with ours."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.described import contents
from equipment.oracle import (
    FACES,
    MODES,
    STOCK_WARNS,
    attempt,
    described,
    face,
    restore,
    save,
    stored,
)
from equipment.trees import abstract, on_mesh, random_array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

pytestmark = STOCK_WARNS
RNG = np.random.default_rng(0)


def state_of(mesh):
    w = RNG.standard_normal((16, 8)).astype(np.float32)
    return {
        "w": on_mesh(w, mesh, "a", "b"),
        "half": on_mesh(w, mesh, "a"),
        "whole": on_mesh(w[:3, :5], mesh),
        "host": RNG.standard_normal((4, 6)),
        "i": on_mesh(np.arange(8, dtype=np.int32), mesh, "a"),
        "n": 3,
    }


def every(tree, **fields):
    return jax.tree.map(lambda _: ocp.SaveArgs(**fields), tree)


def only(tree, name, **fields):
    return {key: ocp.SaveArgs(**(fields if key == name else {})) for key in tree}


BFLOAT16 = jnp.dtype(jnp.bfloat16)
FLOATS = ("w", "half", "whole")
SAVE_ARGS = {
    "none": lambda t: None,
    "empty": lambda t: every(t),
    "bfloat16": lambda t: {k: ocp.SaveArgs(dtype=BFLOAT16 if k in FLOATS else None) for k in t},
    "float16 everywhere": lambda t: every(t, dtype=np.dtype("float16")),
    "float64": lambda t: only(t, "w", dtype=np.dtype("float64")),
    "int32": lambda t: only(t, "w", dtype=np.dtype("int32")),
    "bool": lambda t: only(t, "i", dtype=np.dtype("bool")),
    "same dtype": lambda t: only(t, "w", dtype=np.dtype("float32")),
    "host to float32": lambda t: only(t, "host", dtype=np.dtype("float32")),
    "number to float32": lambda t: only(t, "n", dtype=np.dtype("float32")),
    "jnp dtype": lambda t: only(t, "whole", dtype=jnp.dtype(jnp.float16)),
    "chunks of 16 bytes": lambda t: every(t, chunk_byte_size=16),
    "chunks of 1 byte": lambda t: only(t, "w", chunk_byte_size=1),
    "chunks of 1 MB": lambda t: every(t, chunk_byte_size=2**20),
    "chunks of zero bytes": lambda t: only(t, "w", chunk_byte_size=0),
    "shard axes": lambda t: only(t, "half", shard_axes=(0,)),
    "shard axes and chunks": lambda t: only(t, "half", shard_axes=(1,), chunk_byte_size=32),
    "cast and chunks": lambda t: only(t, "w", dtype=BFLOAT16, chunk_byte_size=8),
    "unknown dtype": lambda t: only(t, "w", dtype=np.dtype("U5")),
}
FORMATS = ({"use_zarr3": False}, {"use_zarr3": True, "use_ocdbt": False})


def assert_saved_alike(face_name, settings, tree, directory, **fields):
    """Saves with stock and with ours, and compares every byte and all metadata."""
    kind = face(face_name)
    stock = kind.stock(use_compression=False, **settings)
    wanted, why = attempt(lambda: save(stock, directory / "stock", kind.stock_save(tree, **fields)))
    for mode in MODES:
        lazy = kind.lazy(options=lazy_orbax.LazyOptions(mode=mode), **settings)
        found, error = attempt(
            lambda: save(lazy, directory / mode, kind.save(tree, **fields))  # noqa: B023
        )
        assert found == wanted, f"stock: {why!r}; ours: {error!r}"
        if wanted == "refused":
            assert isinstance(error, ValueError), repr(error)
            assert list((directory / mode).iterdir()) == []
            continue
        ours, theirs = stored(directory / mode), stored(directory / "stock")
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if ours[name] != theirs[name]] == []
        assert described(lazy, directory / mode) == described(stock, directory / "stock")
    return wanted


def test_a_type_in_place_of_a_dtype_is_taken_for_it(tmp_path):
    """Stock Orbax fails here, with an AttributeError in the background."""
    tree = {"w": np.arange(6.0, dtype=np.float32), "v": np.arange(3.0, dtype=np.float32)}
    save_args = {"w": ocp.SaveArgs(dtype=jnp.bfloat16), "v": ocp.SaveArgs(dtype=np.float16)}
    with ocp.Checkpointer(lazy_orbax.pytree_handler()) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(tree, save_args=save_args))
    with ocp.PyTreeCheckpointer() as stock:
        found = stock.restore(tmp_path / "1")
    assert found["w"].dtype == BFLOAT16
    assert found["v"].dtype == np.float16


@pytest.mark.parametrize("name", SAVE_ARGS)
def test_save_args(name, mesh, tmp_path):
    tree = state_of(mesh)
    for i, settings in enumerate(FORMATS):
        save_args = SAVE_ARGS[name](tree)
        assert_saved_alike("pytree", settings, tree, tmp_path / str(i), save_args=save_args)


def test_a_cast_of_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    tree = {"good": np.float32([1]), "x": np.zeros(4, ml_dtypes.uint2)}
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(dtype=np.dtype(np.float16)), tree)
    with pytest.raises(lazy_orbax.errors.TreeError, match=r"\['x'\]: uint2\[4\]"):
        save(lazy_orbax.pytree_handler(), tmp_path / "x", ocp.args.PyTreeSave(tree, arguments))
    assert list((tmp_path / "x").iterdir()) == []


def test_a_number_that_a_cast_took_beyond_64_bits_is_restored_as_stock_restores_it(tmp_path):
    tree, arguments = {"x": 2**64 - 1}, {"x": ocp.SaveArgs(dtype=np.dtype(ml_dtypes.bfloat16))}
    handler = lazy_orbax.pytree_handler()
    save(handler, tmp_path / "x", ocp.args.PyTreeSave(tree, arguments))
    as_int = ocp.args.PyTreeRestore(tree, {"x": ocp.RestoreArgs(restore_type=int)})
    wanted = restore(ocp.PyTreeCheckpointHandler(), tmp_path / "x", as_int)
    assert restore(handler, tmp_path / "x", as_int) == wanted == {"x": 2**64}


def test_save_args_of_every_face(mesh, tmp_path):
    tree = state_of(mesh)
    for face_name in FACES:
        save_args = SAVE_ARGS["cast and chunks"](tree)
        assert (
            assert_saved_alike(face_name, {}, tree, tmp_path / face_name, save_args=save_args)
            == "accepted"
        )


def test_save_args_of_keys_and_text(tmp_path):
    tree = {"key": jax.random.key(0), "text": "a", "none": None, "x": jnp.ones(4)}
    save_args = {
        "key": ocp.SaveArgs(),
        "text": ocp.SaveArgs(),
        "none": None,
        "x": ocp.SaveArgs(dtype=np.dtype("float16")),
    }
    assert assert_saved_alike("pytree", {}, tree, tmp_path, save_args=save_args) == "accepted"


def test_save_args_of_another_structure(mesh, tmp_path):
    tree = state_of(mesh)
    for name, wrong in {"missing": {"w": ocp.SaveArgs()}, "list": [ocp.SaveArgs()] * 6}.items():
        found = assert_saved_alike("pytree", {}, tree, tmp_path / name, save_args=wrong)
        assert found == "refused"


CUSTOM = {
    "flat": {"a": 1, "b": "text", "c": [1, 2.5, None, True]},
    "nested": {"a": {"b": {"c": [{"d": 1}]}}, "ü": "世界"},
    "empty": {},
    "list": [1, 2],
    "text": "text",
    "zero": 0,
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_metadata(name, mesh, tmp_path):
    tree = {"w": state_of(mesh)["w"]}
    for face_name in FACES:
        custom_metadata = CUSTOM[name]
        assert_saved_alike(
            face_name, {}, tree, tmp_path / face_name, custom_metadata=custom_metadata
        )


@pytest.mark.parametrize("size", [None, 0, 100_000])
@pytest.mark.parametrize("face_name", ["pytree", "direct"])
def test_target_size_of_data_files(face_name, size, mesh, tmp_path):
    tree = {
        str(i): on_mesh(random_array(RNG, (128, 128), np.float32), mesh, "a") for i in range(20)
    }
    assert (
        assert_saved_alike(
            face_name, {"use_zarr3": True}, tree, tmp_path, ocdbt_target_data_file_size=size
        )
        == "accepted"
    )
    for who in ("stock", *MODES):
        largest = max(file.stat().st_size for file in (tmp_path / who).rglob("d/*"))
        assert (largest < 200_000) == bool(size), who


TYPE_HANDLERS = {
    "no sharing between replicas": {"use_replica_parallel": False},
    "small shares are not worth it": {"min_slice_bytes_for_replica_parallel": 2**20},
    "two replicas share": {"max_replicas_for_replica_parallel": 2},
    "shares in a folder of their own": {"enable_replica_parallel_separate_folder": True},
    "no sharding file": {"enable_write_sharding_file": False},
    "no array metadata": {"array_metadata_store": None},
}


def registry_with(**fields):
    return ocp.type_handlers.create_type_handler_registry(
        (int, ocp.type_handlers.ScalarHandler()),
        (float, ocp.type_handlers.ScalarHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler(**fields)),
    )


@pytest.mark.parametrize("name", TYPE_HANDLERS)
def test_settings_of_the_array_handler(name, mesh, tmp_path):
    from orbax.checkpoint._src.metadata import array_metadata_store

    tree = state_of(mesh)
    fields = {"array_metadata_store": array_metadata_store.Store(), **TYPE_HANDLERS[name]}
    for i, settings in enumerate(FORMATS):
        settings = {**settings, "type_handler_registry": registry_with(**fields)}
        assert_saved_alike("pytree", settings, tree, tmp_path / str(i))


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"use_replica_parallel": False, "replica_id": 1}, {}),
        ({"use_replica_parallel": False, "replica_id": 0}, {"use_ocdbt": False}),
        ({"metadata_key": "other.json"}, {"use_ocdbt": False}),
    ],
    ids=str,
)
def test_rare_settings_of_the_array_handler(fields, settings, mesh, tmp_path):
    from orbax.checkpoint._src.metadata import array_metadata_store

    tree = {key: state_of(mesh)[key] for key in ("half", "whole")}
    fields = {"array_metadata_store": array_metadata_store.Store(), **fields}
    settings = {**settings, "type_handler_registry": registry_with(**fields)}
    assert assert_saved_alike("pytree", settings, tree, tmp_path) == "accepted"


def test_a_type_without_a_handler_is_refused(mesh, tmp_path):
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    settings = {"type_handler_registry": registry}
    tree = {"w": state_of(mesh)["w"], "n": 5}
    assert assert_saved_alike("pytree", settings, tree, tmp_path) == "refused"


class Celsius(float):
    """A type of a user, with a type handler of its own."""


class CelsiusHandler(ocp.type_handlers.ScalarHandler):
    def typestr(self):
        return "Celsius"

    async def deserialize(self, infos, args=None):
        return [Celsius(x) for x in await super().deserialize(infos, args)]


def test_a_type_with_a_handler_of_its_own(mesh, tmp_path):
    tree = {"w": state_of(mesh)["w"], "t": Celsius(21.5), "u": Celsius(3.0), "n": 5}

    def registry():
        return ocp.type_handlers.create_type_handler_registry(
            (int, ocp.type_handlers.ScalarHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
            (Celsius, CelsiusHandler()),
        )

    for settings in ({"use_ocdbt": True}, {"use_ocdbt": False}):
        directory = tmp_path / str(settings["use_ocdbt"])
        settings = {**settings, "type_handler_registry": registry()}
        assert assert_saved_alike("pytree", settings, tree, directory) == "accepted"
        found = restore(lazy_orbax.pytree_handler(**settings), directory / "stage")
        assert type(found["t"]) is Celsius
        assert found["t"] == 21.5


def test_rich_types(mesh, tmp_path):
    from orbax.checkpoint._src.metadata import tree as tree_metadata

    tree = {"t": (1, [state_of(mesh)["w"]]), "n": None, "e": ()}
    for rich in (True, False):
        options = tree_metadata.PyTreeMetadataOptions(support_rich_types=rich)
        settings = {"pytree_metadata_options": options}
        assert assert_saved_alike("pytree", settings, tree, tmp_path / str(rich)) == "accepted"


# Restore. Every case runs on a checkpoint of stock and on one of ours, with both handlers.


def other_mesh():
    return Mesh(np.array(jax.devices()[:6]).reshape(2, 3)[:, :2], ("x", "y"))


def numpy_of(_):
    return ocp.RestoreArgs(restore_type=np.ndarray)


RESTORES = {
    "nothing": lambda t, m: {},
    "as numpy": lambda t, m: {"restore_args": jax.tree.map(numpy_of, t)},
    "as numpy of another dtype": lambda t, m: {
        "restore_args": {k: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float16) for k in t}
    },
    "on another mesh": lambda t, m: {
        "restore_args": {
            **jax.tree.map(numpy_of, t),
            "w": ocp.ArrayRestoreArgs(mesh=other_mesh(), mesh_axes=P("y", "x")),
            "half": ocp.ArrayRestoreArgs(sharding=NamedSharding(other_mesh(), P(None, "x"))),
            "i": ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[7])),
        }
    },
    "of another dtype": lambda t, m: {
        "restore_args": {
            **jax.tree.map(numpy_of, t),
            "w": ocp.ArrayRestoreArgs(sharding=t["w"].sharding, dtype=jnp.bfloat16),
            "i": ocp.ArrayRestoreArgs(sharding=t["i"].sharding, dtype=np.float32),
        }
    },
    "padded and cut": lambda t, m: {
        "restore_args": {
            **jax.tree.map(numpy_of, t),
            "w": ocp.ArrayRestoreArgs(sharding=t["w"].sharding, global_shape=(24, 8), strict=False),
            "half": ocp.ArrayRestoreArgs(
                sharding=t["half"].sharding, global_shape=(8, 4), strict=False
            ),
        }
    },
    "of another shape, strictly": lambda t, m: {
        "item": t,
        "restore_args": {
            **jax.tree.map(numpy_of, t),
            "w": ocp.ArrayRestoreArgs(sharding=t["w"].sharding, global_shape=(24, 8)),
        },
    },
    "placeholders": lambda t, m: {
        "item": {**t, "w": ocp.PLACEHOLDER, "n": ocp.PLACEHOLDER},
        "restore_args": jax.tree.map(numpy_of, t),
    },
    "partly": lambda t, m: {
        "item": {"w": 0, "n": 0},
        "restore_args": {"w": numpy_of(0), "n": ocp.RestoreArgs(restore_type=int)},
        "partial_restore": True,
    },
    "partly, without saying so": lambda t, m: {
        "item": {"w": 0},
        "restore_args": {"w": numpy_of(0)},
    },
    "more than there is": lambda t, m: {
        "item": {**t, "more": 0},
        "restore_args": {**jax.tree.map(numpy_of, t), "more": numpy_of(0)},
    },
    "another structure": lambda t, m: {"item": [0, 1], "restore_args": [numpy_of(0)] * 2},
    "number as numpy": lambda t, m: {
        "restore_args": {**jax.tree.map(numpy_of, t), "n": ocp.RestoreArgs(restore_type=float)}
    },
}


@pytest.mark.parametrize("name", RESTORES)
def test_restore_args(name, mesh, tmp_path):
    tree = state_of(mesh)
    save(ocp.PyTreeCheckpointHandler(), tmp_path / "stock", ocp.args.PyTreeSave(tree))
    save(lazy_orbax.pytree_handler(), tmp_path / "lazy", ocp.args.PyTreeSave(tree))
    arguments = RESTORES[name](tree, mesh)
    found = {}
    for reader, make, args_type in (
        ("stock", ocp.PyTreeCheckpointHandler, ocp.args.PyTreeRestore),
        ("lazy", lazy_orbax.pytree_handler, ocp.args.PyTreeRestore),
        ("direct", lazy_orbax.LazyCheckpointHandler, lazy_orbax.args.LazyRestore),
    ):
        for writer in ("stock", "lazy"):
            how, value = attempt(
                functools.partial(restore, make(), tmp_path / writer, args_type(**arguments))
            )
            found[reader, writer] = how, repr(contents(value)) if how == "accepted" else how
            if how == "refused" and reader != "stock":
                assert isinstance(value, ValueError | lazy_orbax.errors.RestoreError), repr(value)
    assert len(set(found.values())) == 1, found


STANDARD = {
    "nothing": lambda t: {},
    "itself": lambda t: {"item": t},
    "abstract": lambda t: {"item": abstract(t)},
    "without shardings": lambda t: {
        "item": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, t
        )
    },
    "another dtype": lambda t: {
        "item": {**abstract(t), "w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)}
    },
    "another mesh": lambda t: {
        "item": {
            **abstract(t),
            "w": jax.ShapeDtypeStruct(
                (16, 8), np.float32, sharding=NamedSharding(other_mesh(), P("x", "y"))
            ),
        }
    },
    "another shape": lambda t: {
        "item": {**abstract(t), "half": jax.ShapeDtypeStruct((8, 8), np.float32)}
    },
    "cut": lambda t: {
        "item": {
            **abstract(t),
            "half": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=t["half"].sharding),
        },
        "strict": False,
    },
    "padded": lambda t: {
        "item": {
            **abstract(t),
            "half": jax.ShapeDtypeStruct((32, 8), np.float32, sharding=t["half"].sharding),
        },
        "strict": False,
    },
    "None for a leaf": lambda t: {"item": {**abstract(t), "w": None}},
    "placeholder": lambda t: {"item": {**abstract(t), "w": ocp.PLACEHOLDER}},
    "missing": lambda t: {"item": {"w": t["w"]}},
    "more": lambda t: {"item": {**abstract(t), "more": 0}},
    "text": lambda t: {"item": {**abstract(t), "w": "text"}},
}


@pytest.mark.parametrize("name", STANDARD)
def test_standard_restore(name, mesh, tmp_path):
    tree = state_of(mesh)
    save(ocp.StandardCheckpointHandler(), tmp_path / "stock", ocp.args.StandardSave(tree))
    save(lazy_orbax.standard_handler(), tmp_path / "lazy", ocp.args.StandardSave(tree))
    args = ocp.args.StandardRestore(**STANDARD[name](tree))
    found = {}
    for reader in (ocp.StandardCheckpointHandler, lazy_orbax.standard_handler):
        for writer in ("stock", "lazy"):
            how, value = attempt(functools.partial(restore, reader(), tmp_path / writer, args))
            found[reader.__name__, writer] = (
                how,
                repr(contents(value)) if how == "accepted" else how,
            )
            if how == "refused" and reader is lazy_orbax.standard_handler:
                assert isinstance(value, ValueError | lazy_orbax.errors.RestoreError), repr(value)
    assert len(set(found.values())) == 1, found


def test_a_misfit_names_the_leaf(mesh, tmp_path):
    tree = state_of(mesh)
    save(lazy_orbax.standard_handler(), tmp_path / "x", ocp.args.StandardSave(tree))
    wrong = {**abstract(tree), "half": jax.ShapeDtypeStruct((8, 8), np.float32)}
    with pytest.raises(lazy_orbax.errors.RestoreError, match=r"\['half'\]: found \[16, 8\]"):
        restore(lazy_orbax.standard_handler(), tmp_path / "x", ocp.args.StandardRestore(wrong))


def test_restoring_what_is_not_there(tmp_path):
    for face_name in FACES:
        with pytest.raises(FileNotFoundError):
            restore(face(face_name).lazy(), tmp_path / "missing")


def test_the_tree_of_the_caller_is_left_alone(mesh, tmp_path):
    tree = {"a": {"w": state_of(mesh)["w"]}, "n": None, "e": [], "t": (1, 2.0)}
    before = repr(contents(tree)), str(jax.tree.structure(tree))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(), tree)
    text = str(save_args)
    save(lazy_orbax.pytree_handler(), tmp_path / "x", ocp.args.PyTreeSave(tree, save_args))
    assert (repr(contents(tree)), str(jax.tree.structure(tree))) == before
    assert str(save_args) == text


def test_metadata_is_json_that_anyone_reads(mesh, tmp_path):
    save(
        lazy_orbax.pytree_handler(),
        tmp_path / "x",
        ocp.args.PyTreeSave(state_of(mesh), custom_metadata={"a": 1}),
    )
    metadata = json.loads((tmp_path / "x" / "_METADATA").read_text())
    assert metadata["custom_metadata"] == {"a": 1}
    assert "lazy" not in json.dumps(metadata)
