"""Which leaves are read by plan, and why others are for Orbax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.oracle import STOCK_WARNS
from etils import epath
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax import LazyOptions
from lazy_orbax.args import LazyRestore, LazySave
from lazy_orbax.restore.wanted import shards_of

pytestmark = STOCK_WARNS
HERE = SingleDeviceSharding(jax.devices()[0])
ARRAY = ocp.ArrayRestoreArgs(sharding=HERE)
TREE = {"w": jnp.arange(8.0), "h": np.arange(3), "n": 2, "none": None}


def restored(tmp_path, item, args, **keywords):
    directory = epath.Path(tmp_path / "c")
    if not directory.exists():
        ocp.Checkpointer(lazy_orbax.LazyCheckpointHandler()).save(directory, args=LazySave(TREE))
    seen = []
    handler = lazy_orbax.LazyCheckpointHandler(options=LazyOptions(on_restore=seen.append))
    value = ocp.Checkpointer(handler).restore(directory, args=LazyRestore(item, args, **keywords))
    return value, seen[0]


def args_with(**changes):
    args = {"w": ARRAY, "h": ocp.RestoreArgs(), "n": ocp.RestoreArgs(), "none": None}
    return {**args, **changes}


def test_a_common_tree_is_read_by_plan(tmp_path):
    value, timeline = restored(tmp_path, TREE, args_with())
    assert (timeline.n_leaves, timeline.by_orbax, timeline.all_by_orbax) == (3, {}, None)
    assert value["none"] is None
    assert value["n"] == 2
    np.testing.assert_array_equal(value["w"], TREE["w"])


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"w": ocp.ArrayRestoreArgs(sharding=HERE, strict=False)}, "strict=False"),
        (
            {"w": ocp.type_handlers.SingleReplicaArrayRestoreArgs(sharding=HERE)},
            "not ArrayRestoreArgs",
        ),
        (
            {"w": ocp.ArrayRestoreArgs(sharding=HERE.with_memory_kind("pinned_host"))},
            "another memory",
        ),
        ({"w": ocp.RestoreArgs(restore_type=jax.Array)}, "not ArrayRestoreArgs"),
    ],
)
def test_an_unusual_leaf_is_for_orbax_and_the_reason_is_said(tmp_path, args, reason):
    try:
        _, timeline = restored(tmp_path, TREE, args_with(**args))
    except ValueError:  # Orbax refuses some; so it was asked.
        return
    assert timeline.n_leaves == 2
    assert reason in timeline.by_orbax["w"]


@pytest.mark.parametrize(
    ("item", "args", "keywords", "reason"),
    [
        (None, None, {}, "no target"),
        ({**TREE, "none": jnp.zeros(2)}, args_with(none=ARRAY), {}, "empty in the target"),
    ],
)
def test_an_unusual_tree_is_for_orbax(tmp_path, item, args, keywords, reason):
    _, timeline = restored(tmp_path, item, args, **keywords)
    assert reason in timeline.all_by_orbax


def test_another_structure_is_refused_as_by_orbax(tmp_path):
    item = {key: TREE[key] for key in ("w", "h")}
    args = {key: args_with()[key] for key in ("w", "h")}
    with pytest.raises(ValueError, match=r"\['n'\]: the target lacks this leaf"):
        restored(tmp_path, item, args)
    value, timeline = restored(tmp_path, item, args, partial_restore=True)
    assert value.keys() == item.keys()
    assert (timeline.n_leaves, timeline.all_by_orbax) == (2, None)


def test_a_placeholder_in_a_part_is_filled_as_by_orbax(tmp_path):
    item, args = {"w": ..., "h": TREE["h"]}, {"w": ARRAY, "h": ocp.RestoreArgs()}
    value, _ = restored(tmp_path, item, args, partial_restore=True)
    stock = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
        epath.Path(tmp_path / "c"), args=ocp.args.PyTreeRestore(item, args, partial_restore=True)
    )
    np.testing.assert_array_equal(stock["w"], TREE["w"])
    np.testing.assert_array_equal(value["w"], TREE["w"])


@dataclasses.dataclass
class Node:
    """A node whose keys have no names."""

    a: object
    b: object


jax.tree_util.register_pytree_node(Node, lambda n: ((n.a, n.b), None), lambda _, c: Node(*c))


def test_nodes_without_names_are_restored_by_orbax(tmp_path):
    tree = {"node": Node(jnp.arange(3.0), jnp.ones(2))}
    ocp.Checkpointer(lazy_orbax.LazyCheckpointHandler()).save(
        epath.Path(tmp_path / "c"), args=LazySave(tree)
    )
    args = jax.tree.map(lambda _: ARRAY, tree)
    value, timeline = restored(tmp_path, tree, args)
    assert timeline.all_by_orbax == "keys of type FlattenedIndexKey"
    np.testing.assert_array_equal(value["node"].a, np.arange(3.0))


def test_shards_are_those_of_this_process_each_once():
    devices = np.array(jax.devices()[:4])
    replicated = shards_of(NamedSharding(Mesh(devices, "a"), P()), (4, 6))
    assert [box.shape for box in replicated.boxes] == [(4, 6)]
    divided = shards_of(NamedSharding(Mesh(devices, "a"), P("a")), (4, 6))
    assert [box.start for box in divided.boxes] == [(i, 0) for i in range(4)]
    assert shards_of(None, (3,)).boxes[0].shape == (3,)
    assert shards_of(None, (0, 3)).boxes == ()
