"""What the program of a slab packs, against what the plan says of each piece."""

import math
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment.fake_devices import FakeDevice, fake_mesh
from equipment.trees import on_mesh, random_array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import make_plan
from lazy_orbax.snapshot import pack, programs

DEVICES = np.array(jax.devices()[:8])
MESH = Mesh(DEVICES.reshape(4, 2), ("a", "b"))
SHUFFLED = Mesh(DEVICES[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(4, 2), ("a", "b"))
ONE = Mesh(DEVICES[[3]], ("a",))
# Dtypes that travel in one carrier each.
CARRIERS = {
    np.float32: [np.float32],
    np.complex64: [np.complex64],
    np.bool_: [np.bool_],
    np.uint32: [np.int32, np.uint32],
    np.uint16: [jnp.bfloat16, np.float16, np.int16, np.uint16],
    np.uint8: [jnp.int4, np.uint8, jnp.float8_e4m3fn, jnp.uint4, np.int8],
}
# Whole; shared along either axis by two, four or all; carried whole by every replica.
PLACES = [
    ((8, 6), ("a", "b")),
    ((8, 6), ("a",)),
    ((3, 8), (None, "b")),
    ((16, 3), ()),
    ((3, 16), ()),
    ((3, 5), ()),
    ((), ()),
    ((16,), (("b", "a"),)),
    ((8, 2, 2), (None, "b")),
]


def plan_of(leaves, *, process_index=0, **policy):
    described = [Leaf(i, f"x{i}", f"[{i}]", x.shape, x.dtype, x.sharding) for i, x in leaves]
    policy = ReplicaPolicy(**policy)
    return make_plan(described, policy, process_index=process_index, slab_bytes=2**20)


def planned(*leaves, **policy):
    """The plan of leaves that are in one slab, and the slab."""
    plan = plan_of(enumerate(leaves), **policy)
    (slab,) = plan.slabs
    assert slab.kind == "mesh"
    return plan, slab


def packed(plan, slab, leaves, *, into):
    program, table = pack.program(plan, slab, into=into)
    buffer = [pack.buffer_of(plan, slab).fresh() for _ in range(into)]
    with jax.set_mesh(pack.local_mesh(slab.mesh)):
        found = program(table, *buffer, *pack.operands(slab, leaves))
    assert all(one.is_deleted() for one in buffer)
    return found


def check_pieces(plan, slab, found, hosts):
    """Every piece is where the plan says, bit for bit."""
    buffers = {shard.device: np.asarray(shard.data) for shard in found.addressable_shards}
    devices = list(slab.mesh.devices.flat)
    assert {devices[piece.device] for piece in slab.pieces} <= set(buffers)
    for buffer in buffers.values():
        assert buffer.nbytes == slab.device_bytes
    for piece in slab.pieces:
        part = buffers[devices[piece.device]][piece.offset :][: math.prod(piece.shape)]
        wanted = hosts[piece.leaf][piece.index]
        assert part.tobytes() == wanted.tobytes(), piece
    assert slab.pieces


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_program_packs_what_the_plan_says(carrier, into):
    rng, dtypes = np.random.default_rng(0), CARRIERS[carrier]
    hosts = [
        random_array(rng, shape, dtypes[i % len(dtypes)]) for i, (shape, _) in enumerate(PLACES)
    ]
    mesh = SHUFFLED if into else MESH
    leaves = [on_mesh(host, mesh, *spec) for host, (_, spec) in zip(hosts, PLACES, strict=True)]
    plan, slab = planned(*leaves)
    found = packed(plan, slab, leaves, into=into)
    assert found.dtype == carrier
    check_pieces(plan, slab, found, hosts)


@pytest.mark.parametrize("into", [True, False])
def test_one_leaf_on_one_device(into):
    host = np.arange(15, dtype=np.float32).reshape(3, 5)
    for sharding in (SingleDeviceSharding(DEVICES[2]), NamedSharding(ONE, P("a"))):
        leaf = jax.device_put(host, sharding)
        plan, slab = planned(leaf)
        check_pieces(plan, slab, packed(plan, slab, [leaf], into=into), [host])


@pytest.mark.parametrize("policy", [{"parallel": False}, {"max_replicas": 2}])
def test_what_other_replicas_write_does_not_move_what_this_one_does(policy):
    hosts = [np.arange(48, dtype=np.float32).reshape(8, 6) + i for i in range(3)]
    leaves = [
        on_mesh(host, MESH, *spec)
        for host, spec in zip(hosts, [("a",), (), (None, "b")], strict=True)
    ]
    plan, slab = planned(*leaves, **policy)
    check_pieces(plan, slab, packed(plan, slab, leaves, into=False), hosts)


class SeenFromOneProcess:
    """An array of which some devices are another process's, as this process sees it."""

    def __init__(self, host, sharding):
        self.shape, self.dtype, self.sharding = host.shape, host.dtype, sharding
        indices = sharding.devices_indices_map(host.shape)
        self.is_fully_replicated = len(set(map(str, indices.values()))) == 1
        self.addressable_shards = [
            SimpleNamespace(data=jax.device_put(host[index], device))
            for device, index in indices.items()
            if device.process_index == jax.process_index()
        ]

    def addressable_data(self, index):
        """The first shard, whatever is asked, of what is fully replicated: so does JAX."""
        return self.addressable_shards[0 if self.is_fully_replicated else index].data


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("is_mine", [(1, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 0, 1)])
def test_a_process_packs_what_it_has_itself(is_mine, into):
    mine = iter(DEVICES[[5, 2, 7, 0]])
    devices = [next(mine) if is_one else FakeDevice(100 + i, 1) for i, is_one in enumerate(is_mine)]
    mesh = Mesh(np.array(devices, dtype=object).reshape(2, 2), ("a", "b"))
    local = pack.local_mesh(mesh)
    assert list(local.devices.flat) == [d for d in devices if d.process_index == 0]
    assert local.axis_names == ("device",)
    specs = [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),)]
    hosts = [np.arange(48, dtype=np.float32).reshape(8, 6) + 100 * i for i in range(len(specs))]
    hosts.append(np.float32(7).reshape(()))
    specs.append(())
    leaves = [
        SeenFromOneProcess(host, NamedSharding(mesh, P(*spec)))
        for host, spec in zip(hosts, specs, strict=True)
    ]
    plan, slab = planned(*leaves)
    found = packed(plan, slab, leaves, into=into)
    assert found.sharding.mesh == local
    assert {shard.device for shard in found.addressable_shards} == set(local.devices.flat)
    check_pieces(plan, slab, found, hosts)


def test_a_process_has_a_program_for_each_shape_of_its_shards():
    devices = [*DEVICES[:2], *(FakeDevice(100 + i, 1) for i in range(2))]
    mesh = Mesh(np.array(devices, dtype=object).reshape(2, 2), ("a", "b"))
    host, plans = np.arange(48, dtype=np.float32).reshape(8, 6), []
    for spec in [("a",), (("a", "b"),), ("a", "b")]:
        leaf = SeenFromOneProcess(host, NamedSharding(mesh, P(*spec)))
        plans.append(planned(leaf, parallel=False))  # Kept, and so are its programs.
        check_pieces(*plans[-1], packed(*plans[-1], [leaf], into=True), [host])


@pytest.mark.parametrize("process_index", [1, 10**6])
def test_the_mesh_of_a_process_has_the_devices_of_its_number(process_index, monkeypatch):
    # Made anew each time: Python keeps one object for each small number only.
    number = str(process_index)
    monkeypatch.setattr(jax, "process_index", lambda: int(number))
    mesh = fake_mesh([0, int(number), 10**9, int(number)], (2, 2), "ab")
    devices = list(mesh.devices.flat)
    assert list(pack.local_mesh(mesh).devices.flat) == [devices[1], devices[3]]


def test_the_mesh_of_a_process_that_has_all_devices_is_the_mesh_itself():
    assert pack.local_mesh(MESH) is MESH
    many = fake_mesh([0] * 400, (400,), "a")
    assert pack.local_mesh(many) is many
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    _, slab = planned(*leaves)
    assert pack.operands(slab, leaves)[0] is leaves[0]


@pytest.mark.parametrize("dtype", [np.float32, jnp.int4])
def test_where_there_are_no_programs_the_question_for_them_makes_none(dtype, monkeypatch):
    plan, slab = planned(on_mesh(np.ones((8, 6), np.float32), MESH, "a").astype(dtype))
    monkeypatch.setattr(pack, "PROGRAMS", weakref.WeakValueDictionary())
    assert not pack.is_compiled(plan, slab)
    assert not plan.kept
    monkeypatch.setattr(pack, "PROGRAMS", {"of another plan": None})
    assert not pack.is_compiled(plan, slab)  # The same answer, by looking.
    assert plan.kept


def test_the_operands_of_a_slab_are_its_own_leaves():
    leaves = [on_mesh(np.ones((8, 6), dtype), MESH, "a") for dtype in (np.float32, np.int8)] * 2
    plan = plan_of(enumerate(leaves))
    assert [slab.leaves for slab in plan.slabs] == [(0, 2), (1, 3)]
    for slab in plan.slabs:
        for operand, i in zip(pack.operands(slab, leaves), slab.leaves, strict=True):
            assert operand is leaves[i]


def test_a_buffer_has_room_for_the_slab_on_every_device():
    # Shared by two, and by eight; carried whole.
    leaves = [on_mesh(np.ones(shape, jnp.bfloat16), MESH, *spec) for shape, spec in PLACES[1:6]]
    plan, slab = planned(*leaves)
    buffer = pack.buffer_of(plan, slab)
    assert buffer == pack.Buffer(
        NamedSharding(MESH, P(("a", "b"))), np.dtype(np.uint16), slab.n_bytes // 2
    )
    assert pack.buffer_of(plan, slab) is buffer
    fresh = buffer.fresh()
    assert (fresh.shape, fresh.dtype, fresh.sharding) == (
        (buffer.size,),
        buffer.dtype,
        buffer.sharding,
    )
    assert not np.asarray(fresh).any()
    assert fresh is not buffer.fresh()


def looks():
    """Leaves of slabs that each need a program of their own."""
    ones = lambda shape=(8, 6), dtype=np.float32: np.ones(shape, dtype)  # noqa: E731
    return {
        "one": [on_mesh(ones(), MESH, "a")],
        "another spec": [on_mesh(ones(), MESH, None, "b")],
        "another mesh": [on_mesh(ones(), SHUFFLED, "a")],
        "another shape": [on_mesh(ones((8, 7)), MESH, "a")],
        "another dtype": [on_mesh(ones(dtype=np.int32), MESH, "a")],
        "another dtype of the same carrier": [on_mesh(ones(dtype=np.uint32), MESH, "a")],
        "two": [on_mesh(ones(), MESH, "a")] * 2,
    }


def test_a_program_is_used_again_for_what_looks_alike_and_for_nothing_else():
    programs, kept = {}, []
    for look, leaves in looks().items():
        for into in (True, False):
            plan, slab = planned(*leaves)
            programs[look, into], table = pack.program(plan, slab, into=into)
            again, same_table = pack.program(plan, slab, into=into)
            assert again is programs[look, into]
            assert same_table is table
            kept.append(plan)
    plan, slab = planned(*looks()["one"], parallel=False)
    programs["not shared"] = pack.program(plan, slab, into=True)[0]
    assert len(set(map(id, programs.values()))) == len(programs)
    for look, leaves in looks().items():
        for into in (True, False):
            assert pack.program(*planned(*leaves), into=into)[0] is programs[look, into]


def test_leaves_that_are_replicated_alike_share_a_column_of_the_table():
    specs = [("a",), (), ("a",), (None, "b"), ("a", "b"), ()]
    leaves = [on_mesh(np.ones((8, 16), np.float32), MESH, *spec) for spec in specs]
    plan, slab = planned(*leaves)
    cuts, table = pack._replica_table(plan, slab)
    assert cuts == ((0, 1, 0), (0, 1, 1), (0, 1, 0), (0, 2, 2), None, (0, 1, 1))
    assert table.dtype == np.int32
    by_axis = [[i % 2 for i in range(8)], list(range(8)), [i // 2 for i in range(8)]]
    assert np.asarray(table).T.tolist() == by_axis
    assert [shard.data.shape for shard in table.addressable_shards] == [(1, 3)] * 8


def test_replicas_are_numbered_in_32_bits_where_jax_has_64():
    plan, slab = planned(on_mesh(np.ones((8, 16), np.float32), MESH, "a"))
    pack._cached_table.cache_clear()
    with jax.enable_x64(True):
        _, table = pack._replica_table(plan, slab)
    pack._cached_table.cache_clear()
    assert table.dtype == np.int32


def test_a_slab_without_cuts_has_a_table_all_the_same():
    plan, slab = planned(on_mesh(np.ones((8, 6), np.float32), MESH, "a", "b"))
    cuts, table = pack._replica_table(plan, slab)
    assert cuts == (None,)
    assert np.asarray(table).tolist() == [[0]] * 8


BF16, U16 = jnp.bfloat16, np.uint16  # The first changes its type, the second does not.
LARGE, BELOW, SMALL = 32, 31, 4  # Elements on each device; 64 bytes are large here.


@pytest.mark.parametrize(
    ("given", "n_writes"),
    [
        ([(LARGE, BF16)], 1),
        ([(LARGE + SMALL, BF16)], 1),
        ([(BELOW, BF16)], 0),
        ([(LARGE, U16)], 0),
        ([(SMALL, BF16)] * 3, 0),
        ([(LARGE, U16), (SMALL, BF16), (LARGE, U16)], 0),
        ([(LARGE, BF16)] * 3, 3),
        ([(SMALL, BF16), (LARGE, BF16)], 2),
        ([(LARGE, BF16), (SMALL, BF16)], 2),
        ([(LARGE, BF16), (LARGE, U16), (SMALL, U16)], 2),
        ([(SMALL, BF16), (LARGE, BF16), (SMALL, U16), (SMALL, BF16), (LARGE, BF16)], 4),
    ],
)
def test_parts_whose_type_changes_are_written_alone_where_they_are_large(
    given, n_writes, monkeypatch
):
    monkeypatch.setattr(pack, "_LEAST_ALONE_BYTES", 64)
    rng = np.random.default_rng(0)
    hosts = [random_array(rng, (8 * n,), dtype) for n, dtype in given]
    leaves = [on_mesh(host, MESH, ("a", "b")) for host in hosts]
    plan, slab = planned(*leaves)
    programs.PROGRAMS.clear()
    program, table = pack.program(plan, slab, into=True)
    buffer = pack.buffer_of(plan, slab).fresh()
    assert program.traced().lower().as_text().count("stablehlo.dynamic_update_slice") == n_writes
    before = [shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards]
    found = program(table, buffer, *leaves)
    programs.PROGRAMS.clear()
    assert buffer.is_deleted()
    assert [shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards] == before
    check_pieces(plan, slab, found, hosts)


def test_half_a_mebibyte_on_each_device_is_large():
    assert pack._LEAST_ALONE_BYTES == 512 * 2**10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int4, np.float32, np.bool_])
def test_a_share_is_carried_as_a_part_of_a_slab_is(dtype):
    host = random_array(np.random.default_rng(0), (6, 8), dtype)
    found = np.asarray(pack.share_of(jnp.asarray(host), (2, 3), (4, 5)))
    assert found.dtype == pack.carrier_of(host.dtype)
    assert found.tobytes() == host[2:6, 3:8].tobytes()
