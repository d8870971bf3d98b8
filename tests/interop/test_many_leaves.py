"""Tens of thousands of leaves: the plan, the programs and the format hold out."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_same

import lazy_orbax

N_LEAVES = 20_000


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
