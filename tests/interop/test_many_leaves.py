"""Tens of thousands of leaves: the plan, the programs and the format hold out."""

import math

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_same

import lazy_orbax

N_LEAVES = 20_000


def test_bytes_on_disk_grow_with_the_leaves_and_not_with_their_square(tmp_path):
    """A flush of a database must not write again all that earlier flushes wrote."""
    bytes_per_leaf = []
    for n_leaves in (512, 8192):
        # Leaves as small as these lie in the nodes of the tree themselves.
        values = np.random.default_rng(0).random((n_leaves, 256), np.float32)
        tree = {f"leaf_{i:05}": value for i, value in enumerate(values)}
        directory = tmp_path / str(n_leaves)
        options = lazy_orbax.LazyOptions(slab_bytes=2**20, host_bytes=2**20)
        with ocp.AsyncCheckpointer(lazy_orbax.pytree_handler(options=options)) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))
        sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
        bytes_per_leaf.append(math.fsum(sizes) / n_leaves)
    # How often is flushed depends on the speed of the disk; 16 times as often would be the square.
    assert bytes_per_leaf[1] < 2.5 * bytes_per_leaf[0]


def test_twenty_thousand_leaves_are_restored_by_stock(tmp_path, mesh):
    names = [f"layer_{i // 100}/w_{i % 100}" for i in range(N_LEAVES)]
    values = np.arange(N_LEAVES * 8, dtype=np.float32).reshape(N_LEAVES, 8)
    sharding = NamedSharding(mesh, P("a"))
    arrays = jax.device_put(list(values), [sharding] * N_LEAVES)
    tree = dict(zip(names, arrays, strict=True))
    with ocp.AsyncCheckpointer(lazy_orbax.pytree_handler()) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(tree))
        for array in arrays:
            array.delete()
        checkpointer.wait_until_finished()
    as_numpy = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
    with ocp.PyTreeCheckpointer() as stock:
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        found = stock.restore(tmp_path / "1", args=args)
    assert_same(found, dict(zip(names, values, strict=True)))
