"""Plans without Orbax, and where snapshots in memory are."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import Plan, make_plan


def plan_of(tree: Any) -> Plan:
    """Returns the plan by which one process keeps a tree."""
    leaves = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        if not isinstance(leaf, str):
            array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            sharding = getattr(leaf, "sharding", None)
            leaves.append(Leaf(i, name, name, array.shape, array.dtype, sharding))
    return make_plan(leaves, ReplicaPolicy(), process_index=0, slab_bytes=2**20)
