import collections
import dataclasses
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from equipment.fake_devices import fake_mesh
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import make_plan

DEVICES = np.array(jax.devices()[:8])
MESH = Mesh(DEVICES.reshape(4, 2), ("a", "b"))
HALF = Mesh(DEVICES[4:].reshape(2, 2), ("a", "b"))
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
KIB = 2**10


def leaves_of(*descriptions):
    """Leaves of (shape, dtype, sharding)."""
    return [Leaf(i, f"x{i}", f"['x{i}']", *parts) for i, parts in enumerate(descriptions)]


def plan_of(leaves, *, slab_bytes=KIB, policy=None, process_index=0):
    return make_plan(
        leaves, policy or ReplicaPolicy(), process_index=process_index, slab_bytes=slab_bytes
    )


def on(mesh, *spec, memory_kind=None):
    return NamedSharding(mesh, P(*spec), memory_kind=memory_kind)


def members(plan):
    return [slab.leaves for slab in plan.slabs]


def test_slabs_are_filled_up_to_their_limit_and_in_order():
    # 64 float32 over 8 devices are 256 bytes: four to a slab.
    plan = plan_of(leaves_of(*[((64,), F32, on(MESH, ("a", "b")))] * 10))
    assert members(plan) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [slab.n_bytes for slab in plan.slabs] == [1024, 1024, 512]
    assert [slab.device_bytes for slab in plan.slabs] == [128, 128, 64]


def test_what_is_given_is_not_packed_and_comes_last():
    sharded, replicated = ((64,), F32, on(MESH, "a")), ((64,), F32, on(MESH))
    first, second, third = leaves_of(sharded, sharded, replicated)
    given = [dataclasses.replace(leaf, is_given=True) for leaf in (first, third)]
    plan = plan_of([given[0], second, given[1]])
    assert [(slab.kind, slab.leaves) for slab in plan.slabs] == [("mesh", (1,)), ("given", (0, 2))]
    # What is on disk does not depend on it.
    copied = plan_of([first, second, third])
    assert plan.layouts == copied.layouts
    assert regions(plan) == regions(copied)
    assert plan.slabs[1].n_bytes == 2 * 64 * 4


def regions(plan):
    return {(p.leaf, p.device, p.start, p.shape) for slab in plan.slabs for p in slab.pieces}


def test_a_leaf_larger_than_a_slab_has_one_of_its_own():
    small, large = ((64,), F32, on(MESH, "a")), ((512, 8), F32, on(MESH, "a"))
    plan = plan_of(leaves_of(small, large, small, small))
    assert members(plan) == [(0,), (1,), (2, 3)]
    assert plan.slabs[1].n_bytes == 512 * 8 * 4


def test_a_slab_has_at_most_256_leaves():
    plan = plan_of(leaves_of(*[((8,), F32, on(MESH, ("a", "b")))] * 600), slab_bytes=2**30)
    assert [len(slab.leaves) for slab in plan.slabs] == [256, 256, 88]
    assert [i for slab in plan.slabs for i in slab.leaves] == list(range(600))


def test_a_slab_is_of_one_mesh_and_one_dtype():
    leaves = leaves_of(
        ((8,), F32, on(MESH, "a")),
        ((8,), BF16, on(MESH, "a")),
        ((8,), F32, on(HALF, "b")),
        ((8,), F32, on(MESH)),
        ((8,), F32, SingleDeviceSharding(DEVICES[5])),
        ((8,), F32, None),
        ((8,), F32, SingleDeviceSharding(DEVICES[5])),
        ((8,), BF16, None),
        ((8,), F32, on(MESH, "a", memory_kind="pinned_host")),
    )
    plan = plan_of(leaves)
    assert members(plan) == [(0, 3), (1,), (2,), (4, 6), (5, 7), (8,)]
    assert [slab.kind for slab in plan.slabs] == ["mesh"] * 4 + ["host", "shards"]
    assert [slab.mesh for slab in plan.slabs[:3]] == [MESH, MESH, HALF]
    assert list(plan.slabs[3].mesh.devices.flat) == [DEVICES[5]]
    assert plan.slabs[4].mesh is plan.slabs[5].mesh is None


def test_in_a_packed_slab_leaves_follow_each_other_without_gaps():
    leaves = leaves_of(
        ((8, 6), F32, on(MESH, "a")),  # Shared by two replicas: 1 x 6 each.
        ((16,), F32, on(MESH, ("a", "b"))),  # 2 each.
        ((3,), F32, on(MESH)),  # Carried whole by every device.
        ((), F32, on(MESH)),
        ((4, 4), F32, on(MESH, "a", "b")),  # 1 x 2 each.
    )
    (slab,) = plan_of(leaves, slab_bytes=2**20).slabs
    sizes = [6, 2, 3, 1, 2]
    offsets = {leaf: sum(sizes[:leaf]) for leaf in range(5)}
    for piece in slab.pieces:
        assert math.prod(piece.shape) == sizes[piece.leaf]
        assert piece.offset == offsets[piece.leaf]
    assert slab.device_bytes == 4 * sum(sizes)
    assert slab.n_bytes == 8 * slab.device_bytes
    assert slab.cuts == ((0, 1), None, None, None, None)
    written = collections.Counter(piece.leaf for piece in slab.pieces)
    assert written == {0: 8, 1: 8, 2: 1, 3: 1, 4: 8}


def test_host_leaves_are_aligned_and_do_not_overlap():
    sizes = [(3, np.dtype(np.int8)), (5, F32), (1, np.dtype(np.complex128)), (33, BF16)]
    leaves = leaves_of(*[((n,), dtype, None) for n, dtype in sizes])
    (slab,) = plan_of(leaves).slabs
    end = 0
    for piece, (n, dtype) in zip(slab.pieces, sizes, strict=True):
        assert piece.offset % 64 == 0
        assert piece.offset >= end
        end = piece.offset + n * dtype.itemsize
    assert end <= slab.n_bytes <= end + 63


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((16 * KIB + 1,), "shards"),  # 64 KiB and a bit on each of 8 devices, divisible by none.
        ((16 * KIB - 1,), "mesh"),
        ((16 * KIB + 8,), "mesh"),  # Shared: each device carries an eighth.
    ],
)
def test_a_large_leaf_is_not_carried_by_every_replica(shape, kind):
    plan = plan_of(leaves_of((shape, F32, on(MESH))), slab_bytes=2**30)
    assert [slab.kind for slab in plan.slabs] == [kind]
    if kind == "shards":
        assert plan.slabs[0].n_bytes < math.prod(shape) * 4 + 64


def test_leaves_without_replicas_are_packed_whatever_their_size():
    plan = plan_of(leaves_of(((2**20, 8), F32, on(MESH, ("a", "b")))))
    assert [slab.kind for slab in plan.slabs] == ["mesh"]


@pytest.mark.parametrize("slab_bytes", [1, 100, 1000, 5000, 10**6])
def test_only_a_single_leaf_exceeds_the_limit(slab_bytes):
    shardings = [on(MESH, "a"), on(MESH), on(HALF, "b"), SingleDeviceSharding(DEVICES[0]), None]
    leaves = leaves_of(
        *[((8 * (1 + i % 7), 4), (F32, BF16)[i % 2], shardings[i % 5]) for i in range(60)]
    )
    plan = plan_of(leaves, slab_bytes=slab_bytes)
    assert sorted(i for slab in plan.slabs for i in slab.leaves) == list(range(60))
    for slab in plan.slabs:
        assert slab.n_bytes <= slab_bytes or len(slab.leaves) == 1
        if slab.kind == "mesh":
            assert len({leaves[i].dtype for i in slab.leaves}) == 1


def test_bytes_written_are_counted_once_per_element():
    leaves = leaves_of(((8, 6), F32, on(MESH)), ((5,), BF16, on(MESH)), ((3,), F32, None))
    assert plan_of(leaves).n_bytes == 8 * 6 * 4 + 5 * 2 + 3 * 4


def test_a_process_without_a_device_of_the_mesh_has_nothing_to_do():
    mesh = fake_mesh([0, 0, 1, 1], (4,), "a")
    leaves = leaves_of(((8,), F32, on(mesh, "a")), ((8,), F32, None))
    plans = [plan_of(leaves, process_index=p) for p in range(3)]
    assert [plan.n_bytes for plan in plans] == [16 + 32, 16, 0]
    assert not [slab for slab in plans[2].slabs if slab.kind == "mesh"]


def test_a_plan_of_the_same_leaves_is_equal():
    leaves = leaves_of(((8, 6), F32, on(MESH, "a")), ((3,), F32, None))

    def content(**knobs):
        plan = plan_of(leaves, **knobs)
        return plan.layouts, [(slab.leaves, slab.cuts, slab.pieces) for slab in plan.slabs]

    assert content() == content()
    assert content() != content(policy=ReplicaPolicy(parallel=False))


def test_indices_of_a_piece():
    leaves = leaves_of(((8, 6), F32, on(MESH, "a")))
    (slab,) = plan_of(leaves).slabs
    piece = next(p for p in slab.pieces if p.start == (3, 0))
    assert piece.index == (slice(3, 4), slice(0, 6))
    assert piece.shard_start == (2, 0)
    assert piece.index_in_shard == (slice(1, 2), slice(0, 6))
