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
from lazy_orbax.plan.slabs import bits_of, carrier_of, make_plan, mesh_of_one, runs

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


@pytest.mark.parametrize(("n", "taken"), [(1, 64), (63, 64), (64, 64), (65, 128), (640, 640)])
def test_a_leaf_in_host_memory_takes_whole_cache_lines(n, taken):
    (slab,) = plan_of(leaves_of(((n,), np.dtype(np.int8), None), ((3,), F32, None))).slabs
    assert [piece.offset for piece in slab.pieces] == [0, taken]
    assert slab.n_bytes == slab.device_bytes == taken + 64


def test_bytes_are_integers_whatever_their_size():
    n = 2**61 + 16  # Floats of 64 bits do not hold it.
    sharded, repeated = ((n,), F32, on(MESH, ("a", "b"))), ((3,), F32, on(MESH))
    plan = plan_of(leaves_of(sharded, repeated), slab_bytes=2**70)
    assert [slab.kind for slab in plan.slabs] == ["shards", "mesh"]
    for slab, expected in zip(plan.slabs, [4 * n, 3 * 4], strict=True):
        assert (slab.device_bytes, type(slab.device_bytes)) == (expected, int)


@pytest.mark.parametrize(
    ("most_bytes", "most", "expected"),
    [
        (5, 9, ["abc", "d", "e"]),
        (4, 9, ["ab", "c", "d", "e"]),
        (10**3, 2, ["ab", "cd", "e"]),
        (10**3, 9, ["abcde"]),
        (0, 9, ["a", "b", "c", "d", "e"]),
        (10**3, 1, ["a", "b", "c", "d", "e"]),
    ],
)
def test_runs_are_as_long_as_fits_and_in_order(most_bytes, most, expected):
    sizes = {"a": 0, "b": 1, "c": 4, "d": 7, "e": 5}
    found = runs("abcde", sizes.__getitem__, most_bytes, most)
    assert ["".join(run) for run in found] == expected
    assert list(runs("", sizes.__getitem__, most_bytes, most)) == []


def test_runs_of_many_members():
    found = runs(range(10**4), lambda member: 1, 10**6, int("3000"))
    assert [len(run) for run in found] == [3000, 3000, 3000, 1000]


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


@pytest.mark.parametrize(("n", "kind"), [(64 * KIB, "mesh"), (64 * KIB + 1, "shards")])
def test_64_kib_are_carried_by_every_replica(n, kind):
    leaves = leaves_of(((n,), np.dtype(np.int8), on(MESH)))
    (slab,) = plan_of(leaves, policy=ReplicaPolicy(parallel=False)).slabs
    assert slab.kind == kind


def test_what_is_copied_shard_by_shard_may_be_of_any_dtype():
    pinned = on(MESH, "a", memory_kind="pinned_host")
    plan = plan_of(leaves_of(((8,), F32, pinned), ((8,), BF16, pinned)))
    assert [(slab.kind, slab.leaves, slab.n_bytes) for slab in plan.slabs] == [
        ("shards", (0, 1), 64 + 64)
    ]


class OtherSharding:
    """One that names no mesh, of the same devices and shards as one that does."""

    def __init__(self, named):
        self.device_set, self.memory_kind = named.device_set, named.memory_kind
        self.shard_shape, self.devices_indices_map = named.shard_shape, named.devices_indices_map


def test_without_a_mesh_only_the_leaves_of_one_device_are_packed():
    one = Mesh(DEVICES[[3]], ("a",))
    many, single = (OtherSharding(on(mesh, "a")) for mesh in (MESH, one))
    plan = plan_of(leaves_of(((8,), F32, many), ((8,), F32, single)))
    assert [(slab.kind, slab.leaves) for slab in plan.slabs] == [("shards", (0,)), ("mesh", (1,))]
    assert plan.slabs[1].mesh == mesh_of_one(DEVICES[3])


def test_a_mesh_without_axes_is_packed_as_its_one_device_is():
    leaves = leaves_of(((8,), F32, on(Mesh(DEVICES[2], ()))))
    (slab,) = plan_of(leaves).slabs
    assert (slab.kind, slab.mesh) == ("mesh", mesh_of_one(DEVICES[2]))


def test_a_leaf_is_packed_up_to_the_last_element_that_32_bits_can_index():
    int8, one = np.dtype(np.int8), SingleDeviceSharding(DEVICES[0])
    plan = plan_of(leaves_of(((2**31 - 1,), int8, one), ((2**31,), int8, one)), slab_bytes=2**40)
    assert [(slab.kind, slab.leaves) for slab in plan.slabs] == [("mesh", (0,)), ("shards", (1,))]


@pytest.mark.parametrize(("dtype", "mesh"), [(F32, MESH), (BF16, HALF), (F32, HALF)])
def test_a_slab_has_as_many_elements_on_each_device_as_can_be_indexed(dtype, mesh):
    most = 2**31 - 1
    for n, expected in [(most // 3, [3, 1]), (most // 3 + 1, [2, 2])]:
        leaf = ((mesh.size * n,), dtype, on(mesh, ("a", "b")))
        plan = plan_of(leaves_of(*[leaf] * 4), slab_bytes=2**50)
        assert [len(slab.leaves) for slab in plan.slabs] == expected


@pytest.mark.parametrize(
    ("names", "carrier"),
    [
        ("bool float32 float64 complex64 complex128", None),  # As they are.
        ("int2 uint4 int4 float4_e2m1fn int8 uint8 float8_e5m2 float8_e8m0fnu", "uint8"),
        ("int16 uint16 float16 bfloat16", "uint16"),
        ("int32 uint32", "uint32"),
        ("int64 uint64", "uint64"),
    ],
)
def test_in_what_a_dtype_travels(names, carrier):
    for name in names.split():
        assert carrier_of(np.dtype(getattr(ml_dtypes, name, name))) == np.dtype(carrier or name)


def test_bits_of_a_dtype():
    bits = {"int2": 2, "uint4": 4, "int4": 4, "float4_e2m1fn": 4, "float8_e5m2": 8, "int8": 8}
    bits |= {"bfloat16": 16, "float16": 16, "uint16": 16, "float32": 32, "int64": 64}
    assert {name: bits_of(np.dtype(getattr(ml_dtypes, name, name))) for name in bits} == bits


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
    taken = [[(slab.n_bytes, slab.device_bytes) for slab in plan.slabs] for plan in plans]
    assert taken == [[(16, 8), (64, 64)], [(16, 8), (0, 0)], [(0, 0)]]
    assert [plan.processes for plan in plans] == [{0, 1}] * 3
    assert not [slab for slab in plans[2].slabs if slab.kind == "mesh"]


@pytest.mark.parametrize("process_index", [1, 2, 10**6])
def test_a_process_has_the_devices_of_its_own_number(process_index):
    # Made anew each time: Python keeps one object for each small number only.
    number = str(process_index)
    mesh = fake_mesh([0, int(number), int(number), 10**9], (4,), "a")
    plan = plan_of(leaves_of(((8,), F32, on(mesh, "a"))), process_index=int(number))
    (slab,) = plan.slabs
    assert [piece.start for piece in slab.pieces] == [(2,), (4,)]
    assert (slab.n_bytes, slab.device_bytes) == (16, 8)


def test_a_plan_of_the_same_leaves_is_equal():
    leaves = leaves_of(((8, 6), F32, on(MESH, "a")), ((3,), F32, None))

    def content(**knobs):
        plan = plan_of(leaves, **knobs)
        return plan.layouts, [(slab.leaves, slab.cuts, slab.pieces) for slab in plan.slabs]

    assert content() == content()
    assert content() != content(policy=ReplicaPolicy(parallel=False))


def test_plans_and_slabs_are_keys_whatever_they_hold():
    """By identity: what is kept for one is looked up on every save."""
    leaves = leaves_of(((8, 6), F32, on(MESH, "a")))
    plan, alike = plan_of(leaves), plan_of(leaves)
    assert len({plan, alike, plan.slabs[0], alike.slabs[0]}) == 4
    plan.kept[plan.slabs[0]] = "a program"
    assert alike.kept == {}
    assert "a program" not in repr(plan)
    for record in (plan, plan.slabs[0], plan.slabs[0].pieces[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, dataclasses.fields(record)[0].name, None)


def test_indices_of_a_piece():
    leaves = leaves_of(((8, 6), F32, on(MESH, "a")))
    (slab,) = plan_of(leaves).slabs
    piece = next(p for p in slab.pieces if p.start == (3, 0))
    assert piece.index == (slice(3, 4), slice(0, 6))
    assert piece.shard_start == (2, 0)
    assert piece.index_in_shard == (slice(1, 2), slice(0, 6))
    assert piece.start_in_shard == (1, 0)


def test_the_mesh_of_one_device():
    mesh = mesh_of_one(DEVICES[5])
    assert list(mesh.devices.flat) == [DEVICES[5]]
    assert mesh_of_one(DEVICES[5]) is mesh
    (slab,) = plan_of(leaves_of(((8,), F32, SingleDeviceSharding(DEVICES[5])))).slabs
    assert slab.mesh is mesh
