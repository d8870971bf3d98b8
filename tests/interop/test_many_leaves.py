"""Tens of thousands of leaves: the plan, the programs and the format hold out."""

import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from equipment.trees import assert_same
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

N_LEAVES = 20_000


@pytest.mark.slow
def test_a_flush_does_not_write_again_all_that_earlier_flushes_wrote(tmp_path):
    """What a database takes on disk would grow with the square of its leaves."""
    # Leaves as small as these lie in the nodes of the tree themselves.
    values = np.random.default_rng(0).random((16_384, 256), np.float32)
    tree = {f"leaf_{i:05}": value for i, value in enumerate(values)}
    options = lazy_orbax.LazyOptions(slab_bytes=2**20, host_bytes=2**20)
    with ocp.AsyncCheckpointer(lazy_orbax.pytree_handler(options=options)) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(tree))
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    # How often is flushed depends on the speed of the disk. Seen were 6 to 7 times the bytes of the
    # leaves, which are copied once more when it is merged, and 30 times with one node for all.
    assert math.fsum(sizes) < 15 * values.nbytes


@pytest.mark.slow
def test_twenty_thousand_leaves_are_stored_and_every_tenth_is_restored_by_stock(tmp_path, mesh):
    """TensorStore reads the bytes of all leaves; stock Orbax, which takes long, restores some."""
    names = [f"layer_{i // 100}/w_{i % 100}" for i in range(N_LEAVES)]
    values = np.arange(N_LEAVES * 8, dtype=np.float32).reshape(N_LEAVES, 8)
    two_devices = jax.sharding.Mesh(mesh.devices[:2, 0], ("a",))
    sharding = NamedSharding(two_devices, P("a"))
    arrays = jax.device_put(list(values), [sharding] * N_LEAVES)
    tree = dict(zip(names, arrays, strict=True))
    with ocp.AsyncCheckpointer(lazy_orbax.pytree_handler()) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(tree))
        for array in arrays:
            array.delete()
        checkpointer.wait_until_finished()
    kvstore = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/1/"}).result()
    chunks = [[kvstore.read(f"{name}/{chunk}") for chunk in (0, 1)] for name in names]
    found = [b"".join(chunk.result().value for chunk in pair) for pair in chunks]
    assert found == [value.tobytes() for value in values]

    wanted = dict(list(zip(names, values, strict=True))[::10])
    with ocp.PyTreeCheckpointer() as stock:
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        restored = stock.restore(tmp_path / "1", args=args)
    assert_same(restored, wanted)
