"""NumPy arrays in the byte order of another machine: their values are what counts, as in stock."""

from __future__ import annotations

import numpy as np
import orbax.checkpoint as ocp
import pytest
from interop.oracle import stored
from trees import all_bits, assert_same, random_array

import lazy_orbax
from lazy_orbax.integrity.fingerprint import of_host

DTYPES = (">f2", ">f4", ">f8", ">c8", ">c16", ">i2", ">i4", ">i8", ">u2", ">u4", ">u8")
FORMATS = ({}, {"use_zarr3": True}, {"use_ocdbt": False})


def state(dtype):
    """Arrays that lie in memory in every way, with NaNs and infinities among the floats."""
    native = np.dtype(dtype).newbyteorder("=")
    rows = random_array(np.random.default_rng(5), (6, 4), native).astype(dtype)
    return {
        "columns": np.asfortranarray(rows),
        "reversed": rows[::-1],
        "rows": rows,
        "scalar": rows[0, 0:1].reshape(()),
        "some": rows[:, ::2],
    }


def native(tree):
    return {name: leaf.astype(leaf.dtype.newbyteorder("=")) for name, leaf in tree.items()}


def saved(handler, path, tree, **keywords):
    with ocp.CheckpointManager(path, item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.PyTreeSave(tree, **keywords))
        manager.wait_until_finished()
    return path / "0" / "default"


@pytest.mark.parametrize("keywords", FORMATS, ids=["default", "zarr3", "no ocdbt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_are_saved(tmp_path, dtype, keywords):
    tree = state(dtype)
    by_stock = saved(ocp.PyTreeCheckpointHandler(**keywords), tmp_path / "stock", tree)
    by_us = saved(lazy_orbax.pytree_handler(**keywords), tmp_path / "lazy", tree)
    with ocp.PyTreeCheckpointer() as stock:
        wanted = stock.restore(by_stock)
        found = stock.restore(by_us)
    assert_same(found, wanted)
    assert_same(found, native(tree))
    if not keywords.get("use_ocdbt", True):
        wanted, found = stored(by_stock), stored(by_us)
        metadata = [name for name in wanted if name.endswith("/.zarray")]
        assert len(metadata) == len(tree)
        # Stock compresses.
        assert [found[n]["dtype"] for n in metadata] == [wanted[n]["dtype"] for n in metadata]
    assert lazy_orbax.verify(by_us).ok
    with ocp.CheckpointManager(
        tmp_path / "lazy", item_handlers=lazy_orbax.pytree_handler(**keywords)
    ) as manager:
        assert_same(manager.restore(0), native(tree))
        good = lazy_orbax.restore_latest_good(manager)
        assert (good.step, good.skipped) == (0, ())
        assert_same(good.value, native(tree))


@pytest.mark.parametrize("wanted", ["<f8", ">f8", ">f4", "bfloat16"])
def test_another_dtype_may_be_asked_for(tmp_path, wanted):
    tree = {"x": np.arange(12).astype(">f4")}
    arguments = {"x": ocp.SaveArgs(dtype=np.dtype(wanted))}
    by_stock = saved(ocp.PyTreeCheckpointHandler(), tmp_path / "stock", tree, save_args=arguments)
    by_us = saved(lazy_orbax.pytree_handler(), tmp_path / "lazy", tree, save_args=arguments)
    with ocp.PyTreeCheckpointer() as stock:
        assert_same(stock.restore(by_us), stock.restore(by_stock))
    assert lazy_orbax.verify(by_us).ok


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_a_target_may_have_either_order(tmp_path, dtype):
    tree = {"x": np.arange(12).astype(">f4"), "y": np.ones((2, 3), ">i8")}
    saved(lazy_orbax.pytree_handler(), tmp_path, tree)
    target = {"x": np.zeros(12, dtype), "y": np.zeros((2, 3), dtype[0] + "i8")}
    found = []
    for handler in (ocp.PyTreeCheckpointHandler(), lazy_orbax.pytree_handler()):
        with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
            found.append(manager.restore(0, args=ocp.args.PyTreeRestore(target)))
    assert_same(found[1], found[0])
    assert_same(found[1], native(tree))


def test_the_order_may_change_from_save_to_save(tmp_path):
    """A plan for one order does not serve the other."""
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.pytree_handler()) as manager:
        for step, dtype in enumerate([">f4", "<f4", ">f4"]):
            manager.save(step, args=ocp.args.PyTreeSave({"x": rows.astype(dtype)}))
            manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as stock:
        assert [all_bits(stock.restore(step)) for step in range(3)] == [all_bits({"x": rows})] * 3
    assert all(lazy_orbax.verify(tmp_path / str(step) / "default").ok for step in range(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_save_is_verified(tmp_path, dtype):
    """The fingerprint is of the values: of the caller's array as of what is written."""
    tree = state(dtype)
    options = lazy_orbax.LazyOptions(verify_snapshot=1)
    item = saved(lazy_orbax.pytree_handler(options=options), tmp_path, tree)
    with ocp.PyTreeCheckpointer() as stock:
        assert_same(stock.restore(item), native(tree))


def test_a_large_array_has_the_fingerprint_of_its_values():
    """It is taken in parts, each of which is copied."""
    rows = random_array(np.random.default_rng(5), (2**11, 2**10), np.dtype("f4"))
    assert of_host(rows.astype(">f4"), (0, 0)) == of_host(rows, (0, 0))
