"""Over all processes, the pieces of a plan cover each element of each leaf exactly once."""

import collections
import math

import numpy as np
from equipment.fake_devices import FakeDevice
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from property.strategies import DTYPES, divided, meshes

from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import make_plan

policies = st.builds(
    ReplicaPolicy,
    replica_id=st.just(0),
    parallel=st.booleans(),
    min_slice_bytes=st.sampled_from([0, 1, 16, 100, 10**6]),
    max_replicas=st.sampled_from([None, 1, 2, 3, 8]),
)
process_assignments = st.integers(1, 8).flatmap(
    lambda n_processes: st.lists(st.integers(0, n_processes - 1), min_size=8, max_size=8)
)


@st.composite
def trees(draw):
    """Leaves on meshes of devices that belong to several processes, and the processes."""
    devices = [FakeDevice(i, p) for i, p in enumerate(draw(process_assignments))]
    some_meshes = draw(st.lists(meshes(devices), min_size=1, max_size=2))
    leaves = []
    for i in range(draw(st.integers(1, 6))):
        place = draw(st.sampled_from(["mesh", "mesh", "mesh", "device", "host"]))
        if place == "mesh":
            # Sometimes so large that it is not carried by every replica.
            most = draw(st.sampled_from([1, 2, 6, 6, 130]))
            shape, sharding = draw(divided(draw(st.sampled_from(some_meshes)), most_per_shard=most))
        else:
            shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
            sharding = None
            if place == "device":
                sharding = SingleDeviceSharding(draw(st.sampled_from(devices)))
        if math.prod(shape) > 10**6:
            shape, sharding = (3,), None
        dtype = draw(st.sampled_from(DTYPES))
        leaves.append(Leaf(i, f"x{i}", f"['x{i}']", shape, dtype, sharding))
    return leaves, range(1 + max(device.process_index for device in devices))


def plans_of(tree, policy, slab_bytes):
    leaves, processes = tree
    return {p: make_plan(leaves, policy, process_index=p, slab_bytes=slab_bytes) for p in processes}


slab_sizes = st.sampled_from([1, 64, 500, 4096, 2**26])


@given(trees(), policies, slab_sizes)
def test_each_element_is_written_exactly_once(tree, policy, slab_bytes):
    times = [np.zeros(leaf.shape, np.int8) for leaf in tree[0]]
    for plan in plans_of(tree, policy, slab_bytes).values():
        for slab in plan.slabs:
            for piece in slab.pieces:
                assert piece.leaf in slab.leaves
                count = times[piece.leaf]
                assert count[piece.index].shape == piece.shape, "it reaches beyond the leaf"
                count[piece.index] += 1
    for leaf, count in zip(tree[0], times, strict=True):
        assert (count == 1).all(), leaf


@given(trees(), st.booleans(), slab_sizes)
def test_in_directories_that_are_not_shared_each_process_writes_its_own(tree, sized, slab_bytes):
    policy = ReplicaPolicy(replica_id=None, parallel=False, min_slice_bytes=16 * sized)
    for process, plan in plans_of(tree, policy, slab_bytes).items():
        for i, leaf in enumerate(tree[0]):
            wanted = np.zeros(leaf.shape, np.int8)
            if leaf.sharding is None:
                wanted += process == 0
            else:
                for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                    if device.process_index == process:
                        wanted[index] = 1
            written = np.zeros(leaf.shape, np.int8)
            for slab in plan.slabs:
                for piece in slab.pieces:
                    if piece.leaf == i:
                        written[piece.index] += 1
            assert (written == wanted).all(), leaf


@given(trees(), policies, slab_sizes)
def test_a_piece_is_inside_its_shard_on_a_device_of_its_process(tree, policy, slab_bytes):
    for process, plan in plans_of(tree, policy, slab_bytes).items():
        for slab in plan.slabs:
            for piece in slab.pieces:
                leaf = plan.leaves[piece.leaf]
                if leaf.sharding is None:
                    continue
                indices = leaf.sharding.devices_indices_map(leaf.shape)
                device = list(indices)[piece.device]
                assert device.process_index == process
                if slab.mesh is not None:
                    assert list(slab.mesh.devices.flat)[piece.device] is device
                starts = tuple(part.start or 0 for part in indices[device])
                assert piece.shard_start == starts
                shard_shape = leaf.sharding.shard_shape(leaf.shape)
                for part, size in zip(piece.index_in_shard, shard_shape, strict=True):
                    assert 0 <= part.start < part.stop <= size


@given(trees(), policies, slab_sizes)
def test_pieces_do_not_overlap_in_the_buffer_of_a_device(tree, policy, slab_bytes):
    for plan in plans_of(tree, policy, slab_bytes).values():
        for slab in plan.slabs:
            if slab.kind == "shards":
                continue  # Nothing is packed: every shard is a buffer of its own.
            buffers = collections.defaultdict(list)
            for piece in slab.pieces:
                itemsize = plan.leaves[piece.leaf].dtype.itemsize
                unit = itemsize if slab.kind == "mesh" else 1
                start = piece.offset * unit
                end = start + math.prod(piece.shape) * itemsize
                buffers[piece.device].append((start, end))
            size = slab.device_bytes if slab.kind == "mesh" else slab.n_bytes
            for spans in buffers.values():
                spans.sort()
                assert spans[0][0] >= 0
                assert spans[-1][1] <= size
                assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


@given(trees(), policies, slab_sizes)
def test_slabs_keep_to_their_limits(tree, policy, slab_bytes):
    for plan in plans_of(tree, policy, slab_bytes).values():
        for slab in plan.slabs:
            assert slab.n_bytes <= slab_bytes or len(slab.leaves) == 1
            assert len(slab.leaves) == len(slab.cuts) <= 256
        members = [i for slab in plan.slabs for i in slab.leaves]
        assert len(set(members)) == len(members)


@given(trees(), policies, slab_sizes)
def test_replicas_are_cut_alike_by_every_process(tree, policy, slab_bytes):
    """The chunk grid on disk is of the leaf, so all processes must agree on it."""
    plans = plans_of(tree, policy, slab_bytes).values()
    for i in range(len(tree[0])):
        assert (
            len({(plan.layouts[i].write_shape, plan.layouts[i].share_axis) for plan in plans}) == 1
        )


@st.composite
def large_trees(draw):
    """Leaves whose shards have up to 2**34 elements, most of them about 2**31."""
    devices = [FakeDevice(i, p) for i, p in enumerate(draw(process_assignments))]
    mesh, leaves = draw(meshes(devices)), []
    for i in range(draw(st.integers(1, 6))):
        shape, sharding = draw(divided(mesh, most_per_shard=3))
        times = [draw(st.sampled_from([1, 2**10, 2**16, 2**29, 2**31 - 1, 2**31])) for _ in shape]
        shape = tuple(n * m for n, m in zip(shape, times, strict=True))
        if math.prod(sharding.shard_shape(shape)) > 2**34:
            shape, sharding = (2**31 - draw(st.integers(0, 2)),), SingleDeviceSharding(devices[0])
        leaves.append(Leaf(i, f"x{i}", f"['x{i}']", shape, draw(st.sampled_from(DTYPES)), sharding))
    return leaves, range(1 + max(device.process_index for device in devices))


@given(large_trees(), policies, st.sampled_from([2**20, 2**26, 2**32, 2**40]))
def test_what_a_program_packs_can_be_indexed_with_32_bits(tree, policy, slab_bytes):
    written = collections.Counter()
    for plan in plans_of(tree, policy, slab_bytes).values():
        for slab in plan.slabs:
            for piece in slab.pieces:
                written[piece.leaf] += math.prod(piece.shape)
            if slab.kind == "mesh":
                most = np.iinfo(np.int32).max
                leaves = [plan.leaves[i] for i in slab.leaves]
                assert all(math.prod(x.sharding.shard_shape(x.shape)) <= most for x in leaves)
                itemsize = leaves[0].dtype.itemsize
                assert slab.device_bytes // itemsize <= most
                for piece in slab.pieces:
                    assert piece.offset + math.prod(piece.shape) <= most
    assert written == {leaf.position: math.prod(leaf.shape) for leaf in tree[0]}
