"""The format matrix: stock and ours read each other, and so does zarr-python."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import zarr
from equipment.oracle import (
    FACES,
    STOCK_WARNS,
    arrays_restored_as,
    described,
    face,
    restore,
    same,
    save,
    stored,
)
from equipment.trees import abstract, on_mesh, random_array
from etils import epath

import lazy_orbax

pytestmark = STOCK_WARNS
RNG = np.random.default_rng(0)
FORMATS = [
    {"use_ocdbt": ocdbt, "use_zarr3": zarr3, "use_compression": compressed}
    for ocdbt in (True, False)
    for zarr3 in (True, False)
    for compressed in (True, False)
]


def name_of(settings):
    return "-".join(name.removeprefix("use_") for name, on in settings.items() if on) or "plain"


def mixed_tree(mesh):
    w = random_array(RNG, (16, 8), np.float32)
    return {
        "w": on_mesh(w, mesh, "a", "b"),
        "half": on_mesh(random_array(RNG, (16, 8), ml_dtypes.bfloat16).view(np.uint16), mesh, "a"),
        "replicated": on_mesh(np.arange(15, dtype=np.int32).reshape(3, 5), mesh),
        "scalar": on_mesh(np.float32(3.5), mesh),
        "key": jax.device_put(jax.random.key(3), on_mesh(np.float32(0), mesh).sharding),
        "host": np.arange(6.0).reshape(2, 3),
        "step": 7,
        "empty": {"none": None, "list": []},
    }


def target(face_name, tree):
    if face_name == "standard":
        return {"item": abstract(tree)}
    return {"item": tree, "restore_args": jax.tree.map(arrays_restored_as, tree)}


@pytest.mark.parametrize("face_name", FACES)
@pytest.mark.parametrize("settings", FORMATS, ids=name_of)
def test_stock_and_ours_read_each_other(face_name, settings, mesh, tmp_path):
    kind, tree = face(face_name), mixed_tree(mesh)
    stock, lazy = kind.stock(**settings), kind.lazy(**settings)
    save(stock, tmp_path / "stock", kind.stock_save(tree))
    save(lazy, tmp_path / "lazy", kind.save(tree))
    # Any handler reads any format, so the readers have the default settings.
    for directory in (tmp_path / "stock", tmp_path / "lazy"):
        args = target(face_name, tree)
        same(restore(kind.lazy(), directory, kind.restore(**args)), tree)
        same(restore(kind.stock(), directory, kind.stock_restore(**args)), tree)
    theirs, ours = stored(tmp_path / "stock"), stored(tmp_path / "lazy")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert described(lazy, tmp_path / "lazy") == described(stock, tmp_path / "stock")


@pytest.mark.parametrize("face_name", FACES)
def test_the_default_is_stock_without_compression(face_name, mesh, tmp_path):
    kind, tree = face(face_name), mixed_tree(mesh)
    save(kind.stock(use_compression=False), tmp_path / "stock", kind.stock_save(tree))
    save(kind.lazy(), tmp_path / "lazy", kind.save(tree))
    theirs, ours = stored(tmp_path / "stock"), stored(tmp_path / "lazy")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("mode", ["stage", "direct"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("zarr3", [False, True])
def test_zarr_python_reads_the_plain_form(zarr3, compressed, mode, mesh, tmp_path):
    arrays = {
        f"{name}.{layout}": on_mesh(random_array(RNG, (8, 4), np.dtype(name)), mesh, *spec)
        for name in ("bool", "int8", "int32", "uint16", "float16", "float32", "complex64")
        for layout, spec in (("sharded", ("a", "b")), ("shared", ("a",)), ("whole", ()))
    }
    tree = {**arrays, "scalar": on_mesh(np.float32(2.5), mesh), "host": np.arange(5.0)}
    handler = lazy_orbax.pytree_handler(
        use_ocdbt=False,
        use_zarr3=zarr3,
        use_compression=compressed,
        options=lazy_orbax.LazyOptions(mode=mode),
    )
    save(handler, tmp_path / "step", ocp.args.PyTreeSave(tree))
    for name, array in tree.items():
        found = zarr.open_array(tmp_path / "step" / name, mode="r")
        assert found.metadata.zarr_format == (3 if zarr3 else 2)
        assert (found.shape, found.dtype) == (array.shape, array.dtype), name
        assert np.asarray(found[...]).tobytes() == np.array(array).tobytes(), name


def test_an_array_called_as_the_file_of_older_checkpoints(tmp_path):
    """Orbax's own handler of single arrays calls each of them so."""
    item = epath.Path(tmp_path)
    handler = ocp.ArrayCheckpointHandler()
    handler.save(item, args=ocp.args.ArraySave(np.arange(3)))
    handler.finalize(item)
    for one in (ocp.PyTreeCheckpointHandler(), lazy_orbax.pytree_handler()):
        assert one.metadata(item).tree["checkpoint"].shape == (3,)
        with pytest.raises(IsADirectoryError):
            one.restore(item)
