"""Leaves of every kind in a save that is verified, packed and sent directly."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from equipment.oracle import STOCK_WARNS
from equipment.trees import abstract, assert_same, on_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.integrity.digest_file import DIRECTORY
from lazy_orbax.integrity.stored_item import StoredItem
from lazy_orbax.restore.compare_arrays import check_restored

pytestmark = STOCK_WARNS
# With the bits that each has.
SMALL = {
    "int2": 2,
    "int4": 4,
    "float4_e2m1fn": 4,
    "float8_e3m4": 8,
    "float8_e4m3b11fnuz": 8,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e8m0fnu": 8,
}


def assert_verified(directory, tree, mode):
    """Saves a tree twice, the second time with programs that are there; restores it twice."""
    options = lazy_orbax.LazyOptions(mode=mode, verify_snapshot=1)
    handler = lazy_orbax.standard_handler(options=options)
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        for step in range(2):
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
            digests = directory / str(step) / "default" / DIRECTORY / "process_0"
            assert b'"proof"' in digests.read_bytes()
            restored = manager.restore(step, args=ocp.args.StandardRestore(abstract(tree)))
            assert_same(restored, tree)
    assert lazy_orbax.verify(directory).is_whole


@pytest.mark.parametrize("mode", ["stage", "direct"])
@pytest.mark.parametrize("name", SMALL)
def test_numbers_of_a_byte_or_less(tmp_path, mesh, name, mode):
    if not hasattr(ts, name):
        pytest.skip(f"this TensorStore stores no {name}")
    dtype, n_values = np.dtype(getattr(ml_dtypes, name)), 2 ** SMALL[name]
    rng = np.random.default_rng(3)

    def values(*shape):
        bits = rng.integers(0, n_values, shape)
        if name.startswith("int"):
            return (bits - n_values // 2).astype(dtype)
        return bits.astype(np.uint8).view(dtype)

    tree = {
        "sharded": on_mesh(values(16, 6), mesh, "a", "b"),
        "replicated": on_mesh(values(16, 3), mesh),
        "odd": on_mesh(values(4, 7), mesh, "a"),
        "scalar": on_mesh(values(), mesh),
        "numpy": values(3, 5),
    }
    assert_verified(tmp_path / "run", tree, mode)


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_wide_numbers_keys_and_scalars(tmp_path, mesh, mode):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        tree = {
            "complex": on_mesh(rng.standard_normal((8, 6)).view(np.complex128), mesh, "a"),
            "int64": on_mesh(rng.integers(-(2**62), 2**62, (8, 6)), mesh, None, "b"),
            "key": jax.random.key(1),
            "keys": jax.device_put(
                jax.random.split(jax.random.key(2, impl="rbg"), 8), NamedSharding(mesh, P("a"))
            ),
            "weak": jax.numpy.full((3,), 2),
            "bool": on_mesh(np.array([True, False] * 8), mesh, ("a", "b")),
            "number": 3,
        }
        assert_verified(tmp_path / "run", tree, mode)


def test_signaling_nans_that_were_wider_on_the_way(tmp_path):
    values = np.array([0x7F800001, 0xFFA00000, 0x3F800000, 0x7FC00000], np.uint32).view(np.float32)
    checkpointer = ocp.Checkpointer(lazy_orbax.pytree_handler())
    checkpointer.save(tmp_path / "0", args=ocp.args.PyTreeSave({"w": values}))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = {"w": ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=one, dtype=np.float64)}
    args = ocp.args.PyTreeRestore(restore_args=asked)
    found = np.array(checkpointer.restore(tmp_path / "0", args=args)["w"])
    quiet = np.array([0x7FC00001, 0xFFE00000, 0x3F800000, 0x7FC00000], np.uint32)
    np.testing.assert_array_equal(found.view(np.uint32), quiet)
    found[2] = 2
    (problem,) = check_restored(StoredItem(str(tmp_path / "0")), {"w": found})
    assert problem.leaf == "w"
