import jax
import numpy as np
import orbax.checkpoint as ocp
from equipment.trees import abstract, assert_same, on_mesh

import lazy_orbax


def test_a_save_through_the_manager_restores(tmp_path, mesh):
    state = {"w": on_mesh(np.arange(64.0, dtype=np.float32).reshape(8, 8), mesh, "a", "b")}
    wanted = jax.tree.map(np.array, state)
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.standard_handler()) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        assert_same(manager.restore(1, args=ocp.args.StandardRestore(abstract(state))), wanted)
