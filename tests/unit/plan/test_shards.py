"""The layout against JAX's own shards, and against what stock Orbax would choose."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from equipment.fake_devices import fake_mesh
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.serialization.replica_slices import get_replica_slices

from lazy_orbax.plan.shards import Layout, Leaf, Region, ReplicaPolicy, is_key, layout_of

DEVICES = np.array(jax.devices()[:8])
MESH_4X2 = Mesh(DEVICES.reshape(4, 2), ("a", "b"))
MESH_2X2X2 = Mesh(DEVICES.reshape(2, 2, 2), ("a", "b", "c"))
MESH_SHUFFLED = Mesh(DEVICES[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(2, 4), ("a", "b"))
MESH_OF_3 = Mesh(DEVICES[[6, 1, 4]], ("a",))
MESH_OF_1 = Mesh(DEVICES[[3]], ("a",))

SHARDINGS = {
    "both axes": (NamedSharding(MESH_4X2, P("a", "b")), (8, 6)),
    "both axes on one dimension": (NamedSharding(MESH_4X2, P(("a", "b"))), (16, 3)),
    "axes swapped": (NamedSharding(MESH_4X2, P("b", "a")), (2, 4)),
    "one axis": (NamedSharding(MESH_4X2, P("a")), (8, 6)),
    "the other axis": (NamedSharding(MESH_4X2, P(None, "b")), (12, 4)),
    "replicated": (NamedSharding(MESH_4X2, P()), (8, 16)),
    "replicated, divides along the second axis": (NamedSharding(MESH_4X2, P()), (3, 16)),
    "replicated, divides nowhere": (NamedSharding(MESH_4X2, P()), (3, 5)),
    "replicated scalar": (NamedSharding(MESH_4X2, P()), ()),
    "shard of one element": (NamedSharding(MESH_4X2, P("a")), (4,)),
    "three axes, one used": (NamedSharding(MESH_2X2X2, P(None, "b")), (4, 6, 8)),
    "three axes, outer and inner": (NamedSharding(MESH_2X2X2, P(("c", "a"))), (8, 4)),
    "shuffled devices": (NamedSharding(MESH_SHUFFLED, P("b")), (8, 2)),
    "shuffled, replicated": (NamedSharding(MESH_SHUFFLED, P()), (2, 8)),
    "three devices": (NamedSharding(MESH_OF_3, P("a")), (9, 2)),
    "three devices, replicated": (NamedSharding(MESH_OF_3, P()), (4, 9)),
    "mesh of one device": (NamedSharding(MESH_OF_1, P("a")), (5, 2)),
    "single device": (SingleDeviceSharding(DEVICES[2]), (7,)),
    "single device scalar": (SingleDeviceSharding(DEVICES[0]), ()),
    "pinned": (NamedSharding(MESH_4X2, P("a"), memory_kind="pinned_host"), (8, 6)),
    "pinned, sliceable": (NamedSharding(MESH_4X2, P("a"), memory_kind="pinned_host"), (32, 256)),
    "unpinned": (NamedSharding(MESH_4X2, P("a"), memory_kind="unpinned_host"), (8, 6)),
    "pinned, three dimensions": (
        NamedSharding(MESH_4X2, P("a"), memory_kind="pinned_host"),
        (8, 8, 128),
    ),
    "pinned, too small": (NamedSharding(MESH_4X2, P("a"), memory_kind="pinned_host"), (16, 128)),
    "pinned, short rows": (
        NamedSharding(MESH_4X2, P("a"), memory_kind="_".join(["pinned", "host"])),  # Another str.
        (1024, 100),
    ),
    "pinned, one dimension": (NamedSharding(MESH_4X2, P(), memory_kind="pinned_host"), (2048,)),
}
POLICIES = {
    "shared": ReplicaPolicy(),
    "not shared": ReplicaPolicy(parallel=False),
    "another replica": ReplicaPolicy(parallel=False, replica_id=1),
    "shared, another replica": ReplicaPolicy(replica_id=1),
    "every process its own": ReplicaPolicy(parallel=False, replica_id=None),
    **{f"at least {n} B": ReplicaPolicy(min_slice_bytes=n) for n in (1, 12, 24, 64, 10**9)},
    **{f"at most {n} replicas": ReplicaPolicy(max_replicas=n) for n in (0, 1, 2, 3, 100)},
    "two limits": ReplicaPolicy(max_replicas=2, min_slice_bytes=32),
}


def array_of(sharding, shape, dtype=np.float32):
    return jax.device_put(np.zeros(shape, dtype), sharding)


def leaf_of(array):
    return Leaf(0, "x", "['x']", array.shape, array.dtype, array.sharding)


def start_of(index):
    return tuple(part.start or 0 for part in index)


@pytest.mark.parametrize("name", SHARDINGS)
def test_replica_numbers_and_starts_are_those_of_jax(name):
    sharding, shape = SHARDINGS[name]
    array = array_of(sharding, shape)
    layout = layout_of(leaf_of(array), ReplicaPolicy(parallel=False), 0)
    devices = list(sharding.devices_indices_map(shape))
    by_device = {shard.device: shard for shard in array.addressable_shards}
    assert dict(zip(devices, layout.replica_ids, strict=True)) == {
        device: shard.replica_id for device, shard in by_device.items()
    }
    assert layout.replicated == any(shard.replica_id > 0 for shard in by_device.values())
    assert layout.write_shape == array.addressable_shards[0].data.shape
    for region in layout.regions:
        assert (
            region.start == region.shard_start == start_of(by_device[devices[region.device]].index)
        )


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("name", SHARDINGS)
def test_the_same_regions_as_stock_orbax(name, policy_name):
    sharding, shape = SHARDINGS[name]
    policy = POLICIES[policy_name]
    for dtype in (np.float32, np.int8):
        array = array_of(sharding, shape, dtype)
        stock = get_replica_slices(
            array,
            policy.replica_id,
            policy.parallel,
            policy.min_slice_bytes,
            policy.max_replicas,
        )
        layout = layout_of(leaf_of(array), policy, 0)
        assert layout.write_shape == stock.local_shape
        assert layout.holds_whole_shards, "there is no other process"
        devices = list(sharding.devices_indices_map(shape))
        ours = {(devices[region.device].id, region.start) for region in layout.regions}
        theirs = {
            (next(iter(piece.unsliced_data.devices())).id, start_of(piece.index))
            for piece in stock.replica_slices
        }
        assert ours == theirs
        axes = {piece.slice_args and piece.slice_args.axis for piece in stock.replica_slices}
        assert axes <= {layout.share_axis}


def test_the_table_has_shared_and_unshared_layouts():
    """Else the comparison with stock would prove less than it seems to."""
    shared = [
        layout_of(leaf_of(array_of(sharding, shape)), policy, 0).share_axis
        for (sharding, shape), policy in itertools.product(SHARDINGS.values(), POLICIES.values())
    ]
    assert {None, 0, 1} <= set(shared)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_a_leaf_in_host_memory_is_written_whole_by_process_zero(shape):
    leaf = Leaf(0, "x", "['x']", shape, np.dtype(np.int16), None)
    origin = (0,) * len(shape)
    whole = Layout(shape, None, (), False, True, (Region(0, origin, origin),), frozenset())
    assert layout_of(leaf, ReplicaPolicy(), 0) == whole
    assert layout_of(leaf, ReplicaPolicy(), 1).regions == ()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Two processes of two devices, a leaf of 8 on all four: who writes what.
        (ReplicaPolicy(), {0: [(0, 2), (2, 4)], 1: [(4, 6), (6, 8)]}),
        (ReplicaPolicy(max_replicas=2), {0: [(0, 4), (4, 8)], 1: []}),
        (ReplicaPolicy(parallel=False), {0: [(0, 8)], 1: []}),
        (ReplicaPolicy(parallel=False, replica_id=2), {0: [], 1: [(0, 8)]}),
        (ReplicaPolicy(parallel=False, replica_id=None), {0: [(0, 8)], 1: [(0, 8)]}),
        (ReplicaPolicy(min_slice_bytes=9), {0: [(0, 8)], 1: []}),
        (ReplicaPolicy(min_slice_bytes=8), {0: [(0, 2), (2, 4)], 1: [(4, 6), (6, 8)]}),
    ],
)
def test_processes_divide_a_replicated_leaf(policy, expected):
    mesh = fake_mesh([0, 0, 1, 1], (4,), "a")
    leaf = Leaf(0, "x", "['x']", (8,), np.dtype(np.float32), NamedSharding(mesh, P()))
    for process, ranges in expected.items():
        layout = layout_of(leaf, policy, process)
        assert layout.processes == {p for p, written in expected.items() if written}
        (size,) = layout.write_shape
        assert [(r.start[0], r.start[0] + size) for r in layout.regions] == ranges


@pytest.mark.parametrize(
    "process_of_device",
    [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1)],
)
def test_a_directory_that_is_not_shared_gets_every_local_shard(process_of_device):
    """With `replica_id=None`, whatever replica of it the process happens to have."""
    mesh = fake_mesh(process_of_device, (2, 2), "ab")
    leaf = Leaf(0, "x", "['x']", (4,), np.dtype(np.float32), NamedSharding(mesh, P("a")))
    policy = ReplicaPolicy(parallel=False, replica_id=None)
    for process in (0, 1):
        local = {
            start_of(index)
            for device, index in leaf.sharding.devices_indices_map((4,)).items()
            if device.process_index == process
        }
        starts = [region.start for region in layout_of(leaf, policy, process).regions]
        assert sorted(starts) == sorted(local)


@pytest.mark.parametrize(
    ("process_of_device", "spec", "policy", "expected"),
    [
        ((0, 0, 1, 1), ("a",), ReplicaPolicy(), True),  # Both halves of its shard are its own.
        ((0, 1, 0, 1), ("a",), ReplicaPolicy(), False),
        ((0, 1, 0, 1), ("a",), ReplicaPolicy(parallel=False), True),
        ((0, 1, 1, 1), (), ReplicaPolicy(), False),
        ((0, 1, 1, 1), (), ReplicaPolicy(max_replicas=1), True),
        ((0, 0, 1, 1), (), ReplicaPolicy(max_replicas=2), True),  # The other one has none.
        ((0, 1, 0, 1), ("a", "b"), ReplicaPolicy(), True),
    ],
)
def test_whether_a_process_writes_whole_shards(process_of_device, spec, policy, expected):
    mesh = fake_mesh(process_of_device, (2, 2), "ab")
    leaf = Leaf(0, "x", "['x']", (8, 2), np.dtype(np.float32), NamedSharding(mesh, P(*spec)))
    for process in (0, 1):
        assert layout_of(leaf, policy, process).holds_whole_shards == expected


@pytest.mark.parametrize("replica_id", [0, 1, None])
def test_the_processes_that_write_are_those_whose_layouts_have_regions(replica_id):
    mesh = fake_mesh([0, 1, 2, 0], (2, 2), "ab")
    policy = ReplicaPolicy(parallel=False, replica_id=replica_id)
    for spec in [(), ("a",), ("b",), ("a", "b")]:
        leaf = Leaf(0, "x", "['x']", (8, 2), np.dtype(np.float32), NamedSharding(mesh, P(*spec)))
        layouts = [layout_of(leaf, policy, process) for process in range(3)]
        writers = {process for process, layout in enumerate(layouts) if layout.regions}
        assert [layout.processes for layout in layouts] == [writers] * 3


def test_the_size_of_a_share_is_compared_exactly():
    mesh, n = fake_mesh([0, 0], (2,), "a"), 2**53 + 1  # Floats of 64 bits do not hold it.
    leaf = Leaf(0, "x", "['x']", (2 * n,), np.dtype(np.int8), NamedSharding(mesh, P()))
    for least, axis in [(n, 0), (n + 1, None)]:
        assert layout_of(leaf, ReplicaPolicy(min_slice_bytes=least), 0).share_axis == axis


def test_one_replica_of_many_writes():
    mesh = fake_mesh([0] * 400, (400,), "a")
    leaf = Leaf(0, "x", "['x']", (3,), np.dtype(np.int8), NamedSharding(mesh, P()))
    policy = ReplicaPolicy(parallel=False, replica_id=int("399"))
    assert layout_of(leaf, policy, 0).regions == (Region(399, (0,), (0,)),)


def test_records_cannot_be_changed():
    """Layouts are cached, and shared by all the plans of one process."""
    leaf = Leaf(0, "x", "['x']", (3,), np.dtype(np.int8), None)
    layout = layout_of(leaf, ReplicaPolicy(), 0)
    for record in (leaf, ReplicaPolicy(), layout, layout.regions[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, dataclasses.fields(record)[0].name, None)


def test_keys_are_told_from_their_data():
    keys = jax.random.split(jax.random.key(0), 2)
    assert is_key(keys)
    assert not is_key(jax.random.key_data(keys))


def test_sharing_with_processes_that_see_no_common_directory_loses_nothing():
    """Stock Orbax refuses `replica_id=None` with parallel writing. Half a leaf is no answer."""
    mesh = fake_mesh([0, 1], (2,), "a")
    leaf = Leaf(0, "x", "['x']", (8,), np.dtype(np.float32), NamedSharding(mesh, P()))
    try:
        layouts = [layout_of(leaf, ReplicaPolicy(replica_id=None), p) for p in (0, 1)]
    except ValueError:
        return
    assert [(layout.write_shape, len(layout.regions)) for layout in layouts] == [((8,), 1)] * 2
