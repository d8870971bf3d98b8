"""Every path a slab takes from the device to the host, those of an accelerator included."""

import gc
import math
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from trees import assert_same, on_mesh, random_array

import lazy_orbax
from lazy_orbax import snapshot
from lazy_orbax.layout import Leaf, ReplicaPolicy
from lazy_orbax.plan import Slab, make_plan

DEVICES = np.array(jax.devices()[:8])
MESH = Mesh(DEVICES.reshape(4, 2), ("a", "b"))
MESH_SHUFFLED = Mesh(DEVICES[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(2, 4), ("a", "b"))
HALF = Mesh(DEVICES[4:].reshape(2, 2), ("a", "b"))
KIB, MIB = 2**10, 2**20

# Backends: (copies to pinned host memory can be enqueued, what is staged is in host memory).
BACKENDS = {
    "CPU": (True, True),
    "CPU without pinned memory": (False, True),
    "accelerator": (True, False),
    "accelerator without pinned memory": (False, False),
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    pinned, in_host_memory = BACKENDS[request.param]
    monkeypatch.setattr(snapshot, "has_pinned_host", lambda device: pinned)
    monkeypatch.setattr(snapshot, "is_in_host_memory", lambda slab: in_host_memory)
    return SimpleNamespace(pinned=pinned, in_host_memory=in_host_memory)


def values():
    """Leaves of every route, as host arrays and where they are put."""
    rng = np.random.default_rng(0)
    places = [
        ((8, 6), np.float32, NamedSharding(MESH, P("a", "b"))),
        ((8, 6), np.float32, NamedSharding(MESH, P("a"))),
        ((16, 3), np.float32, NamedSharding(MESH, P(None))),
        ((3, 5), np.float32, NamedSharding(MESH, P())),
        ((), np.float32, NamedSharding(MESH, P())),
        ((4, 8), jnp.bfloat16, NamedSharding(MESH, P(None, "b"))),
        ((8,), jnp.float8_e4m3fn, NamedSharding(MESH, P(("b", "a")))),
        ((8, 8), jnp.int4, NamedSharding(MESH, P("b", "a"))),
        ((4, 4), np.bool_, NamedSharding(HALF, P("a", "b"))),
        ((4, 4), np.complex64, NamedSharding(MESH_SHUFFLED, P("b"))),
        ((16,), np.uint32, NamedSharding(MESH_SHUFFLED, P())),
        ((5,), np.int8, SingleDeviceSharding(DEVICES[5])),
        ((17 * KIB + 3,), np.float32, NamedSharding(MESH, P())),
        ((8, 6), np.float32, NamedSharding(MESH, P("a"), memory_kind="pinned_host")),
        ((6,), np.float32, SingleDeviceSharding(DEVICES[1], memory_kind="pinned_host")),
        ((2, 3), np.float64, None),
        ((), np.int64, None),
    ]
    hosts = [random_array(rng, shape, dtype) for shape, dtype, _ in places]
    placed = [
        host if sharding is None else jax.device_put(host, sharding, may_alias=False)
        for host, (_, _, sharding) in zip(hosts, places, strict=True)
    ]
    return [np.array(host) for host in hosts], jax.block_until_ready(placed)


def plan_of(leaves, *, slab_bytes=MIB, policy=None):
    described = [
        Leaf(i, f"x{i}", f"[{i}]", x.shape, x.dtype, getattr(x, "sharding", None))
        for i, x in enumerate(leaves)
    ]
    return make_plan(described, policy or ReplicaPolicy(), process_index=0, slab_bytes=slab_bytes)


def collected(plan, held_slabs):
    """What a snapshot holds, put together; every element must come exactly once."""
    found = [np.zeros(leaf.shape, leaf.dtype) for leaf in plan.leaves]
    times = [np.zeros(leaf.shape, int) for leaf in plan.leaves]
    for held in held_slabs:
        for piece, view in snapshot.views(plan, snapshot.to_host(held)):
            assert view.shape == piece.shape
            found[piece.leaf][piece.index] = view
            times[piece.leaf][piece.index] += 1
    assert all((count == 1).all() for count in times)
    return found


def spoil(leaves):
    """What a training loop does to its state as soon as it may."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.delete()
        elif leaf.ndim:
            leaf[...] = 0


POLICIES = {
    "shared": ReplicaPolicy(),
    "not shared": ReplicaPolicy(parallel=False),
    "two share": ReplicaPolicy(max_replicas=2),
    "where it pays": ReplicaPolicy(min_slice_bytes=16),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["auto", "stage", "direct"])
def test_every_path_gives_the_same_bits_after_the_arrays_are_gone(backend, mode, policy):
    wanted, leaves = values()
    plan = plan_of(leaves, slab_bytes=KIB, policy=POLICIES[policy])
    assert {slab.kind for slab in plan.slabs} == {"mesh", "shards", "host"}
    room = snapshot.Room(mode)
    held = [snapshot.take(plan, slab, leaves, room.mode_for(slab)) for slab in plan.slabs]
    spoil(leaves)
    assert_same(collected(plan, held), wanted)


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_a_slab_taken_by_either_mode_says_where_it_is(backend, mode):
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plan = plan_of(leaves)
    held = snapshot.take(plan, plan.slabs[0], leaves, mode)
    assert held.on_host == (mode == "direct" or backend.in_host_memory)
    assert snapshot.to_host(held).on_host


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_the_next_step_may_donate_and_still_aliases(backend, mode):
    """No view of the caller's arrays is held: donation is neither refused nor turned into a copy."""
    wanted = np.arange(64 * KIB, dtype=np.float32).reshape(8, -1)
    state = [on_mesh(wanted, MESH, "a", "b"), on_mesh(wanted, MESH, "a")]
    jax.block_until_ready(state)
    step = jax.jit(lambda tree: [x + 1 for x in tree], donate_argnums=0)
    plan = plan_of(state)
    before = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in state]
    held = [snapshot.take(plan, slab, state, mode) for slab in plan.slabs]
    donated, state = state, step(state)
    assert all(x.is_deleted() for x in donated)
    after = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in state]
    assert after == before
    assert_same(collected(plan, held), [wanted, wanted])


def test_staging_lets_go_of_the_device_copy_when_the_bytes_are_on_the_host(monkeypatch):
    _check_device_copy_is_dropped(monkeypatch, pinned=True)


def test_staging_lets_go_of_the_device_copy_without_pinned_memory_too(monkeypatch):
    _check_device_copy_is_dropped(monkeypatch, pinned=False)


def _check_device_copy_is_dropped(monkeypatch, *, pinned):
    monkeypatch.setattr(snapshot, "has_pinned_host", lambda device: pinned)
    monkeypatch.setattr(snapshot, "is_in_host_memory", lambda slab: False)
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plan = plan_of(leaves)
    held = snapshot.stage(plan, plan.slabs[0], leaves)
    device_copy = weakref.ref(held.arrays[0])
    held = snapshot.to_host(held)
    gc.collect()
    assert device_copy() is None
    assert len(snapshot.views(plan, held)) == len(plan.slabs[0].pieces)


def test_direct_takes_no_device_memory_without_pinned_memory(monkeypatch):
    """It waits for the copy to the host, and what it holds then is in host memory."""
    monkeypatch.setattr(snapshot, "has_pinned_host", lambda device: False)
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a", "b")]
    plan = plan_of(leaves)
    held = snapshot.direct(plan, plan.slabs[0], leaves)
    on_device = [
        x for x in held.arrays if isinstance(x, jax.Array) and x.sharding.memory_kind == "device"
    ]
    assert not on_device


@pytest.mark.parametrize("mode", ["stage", "direct"])
@pytest.mark.parametrize(
    "spec", [(), ("a",), ("b",), ("a", "b")], ids=lambda spec: "x".join(spec) or "replicated"
)
def test_a_slab_takes_no_more_host_memory_than_the_budget_is_told(mode, spec):
    leaves = [on_mesh(np.ones((64, 64), np.float32), MESH, *spec)]
    plan = plan_of(leaves)
    (slab,) = plan.slabs
    held = snapshot.to_host(snapshot.take(plan, slab, leaves, mode))
    assert _held_bytes(held) <= slab.n_bytes


def test_direct_takes_only_the_share_that_this_process_writes():
    """As with eight processes of one device: each writes an eighth of what is replicated."""
    leaves = [on_mesh(np.ones((64, 64), np.float32), MESH)]
    plan = plan_of(leaves)
    (slab,) = plan.slabs
    mine = Slab(
        slab.kind, slab.leaves, slab.cuts, slab.pieces[:1], slab.n_bytes // 8, 0, slab.mesh
    )
    held = snapshot.direct(plan, mine, leaves)
    assert _held_bytes(held) <= mine.n_bytes


def _held_bytes(held):
    return sum(
        shard.data.nbytes
        for array in held.arrays
        if isinstance(array, jax.Array)
        for shard in array.addressable_shards
    ) + sum(array.nbytes for array in held.arrays if isinstance(array, np.ndarray))


def test_slabs_that_look_alike_share_a_program():
    snapshot._packer.cache_clear()
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a") for _ in range(8)]
    plan = plan_of(leaves, slab_bytes=2 * leaves[0].nbytes)
    assert len(plan.slabs) == 4
    for slab in plan.slabs:
        snapshot.stage(plan, slab, leaves)
    assert snapshot._packer.cache_info().misses == 1


# Room: which mode, slab by slab.


def slabs_of(n, *, n_bytes=100, mesh=HALF):
    return [Slab("mesh", (0,), (None,), (), n_bytes * 4, n_bytes, mesh) for _ in range(n)]


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator whose devices have so many bytes free, by device."""
    free, asked = {}, []

    def free_bytes(device):
        asked.append(device)
        return free.get(device, math.inf)

    monkeypatch.setattr(snapshot, "is_in_host_memory", lambda slab: False)
    monkeypatch.setattr(snapshot, "_free_device_bytes", free_bytes)
    return SimpleNamespace(free=free, asked=asked)


@pytest.mark.parametrize(
    ("free_bytes", "modes"),
    [
        (math.inf, ["stage"] * 4),
        (400, ["stage"] * 4),
        (399, ["stage"] * 3 + ["direct"]),
        (250, ["stage", "stage", "direct", "direct"]),
        (99, ["direct"] * 4),
        (0, ["direct"] * 4),
        (-1000, ["direct"] * 4),  # The step at its peak took more than is usable.
    ],
)
def test_auto_stages_what_fits_and_sends_the_rest(accelerator, free_bytes, modes):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, free_bytes))
    room = snapshot.Room("auto")
    assert [room.mode_for(slab) for slab in slabs_of(4)] == modes


def test_the_fullest_device_decides(accelerator):
    accelerator.free[HALF.devices[1, 1]] = 150
    room = snapshot.Room("auto")
    assert [room.mode_for(slab) for slab in slabs_of(3)] == ["stage", "direct", "direct"]


def test_a_small_slab_still_fits_after_a_large_one_did_not(accelerator):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, 150))
    room = snapshot.Room("auto")
    (large,), (small,) = slabs_of(1, n_bytes=200), slabs_of(1, n_bytes=100)
    assert [room.mode_for(slab) for slab in (large, small)] == ["direct", "stage"]


def test_meshes_that_share_devices_share_their_memory(accelerator):
    accelerator.free.update(dict.fromkeys(DEVICES, 150))
    room = snapshot.Room("auto")
    (first,), (second,) = slabs_of(1, mesh=HALF), slabs_of(1, mesh=MESH)
    (elsewhere,) = slabs_of(1, mesh=Mesh(DEVICES[:4], ("a",)))
    assert [room.mode_for(slab) for slab in (first, second, elsewhere)] == [
        "stage",
        "direct",
        "stage",
    ]


def test_memory_is_asked_once_per_device_and_save(accelerator):
    room = snapshot.Room("auto")
    for slab in slabs_of(5):
        room.mode_for(slab)
    assert sorted(d.id for d in accelerator.asked) == sorted(d.id for d in HALF.devices.flat)


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_a_mode_that_was_asked_for_is_used_whatever_is_free(accelerator, mode):
    accelerator.free.update(dict.fromkeys(HALF.devices.flat, 0))
    room = snapshot.Room(mode)
    assert [room.mode_for(slab) for slab in slabs_of(2)] == [mode, mode]
    assert accelerator.asked == []


@pytest.mark.parametrize("mode", ["auto", "stage", "direct"])
@pytest.mark.parametrize(("kind", "expected"), [("host", "host"), ("shards", "direct")])
def test_slabs_that_cannot_be_packed_have_one_mode(mode, kind, expected):
    slab = Slab(kind, (0,), (None,), (), 64, 64)
    assert snapshot.Room(mode).mode_for(slab) == expected


def test_on_cpu_auto_stages(monkeypatch):
    monkeypatch.setattr(snapshot, "_free_device_bytes", lambda device: 0)
    assert snapshot.Room("auto").mode_for(slabs_of(1)[0]) == "stage"


def test_with_several_processes_auto_agrees_without_asking(accelerator, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert snapshot.Room("auto").mode_for(slabs_of(1)[0]) == "direct"


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (None, math.inf),
        ({}, math.inf),
        ({"bytes_in_use": 7}, math.inf),
        ({"bytes_limit": 1000}, 950),
        ({"bytes_limit": 1000, "bytes_in_use": 200}, 750),
        ({"bytes_limit": 1000, "bytes_in_use": 200, "peak_bytes_in_use": 600}, 350),
        ({"bytes_limit": 1000, "bytes_in_use": 700, "peak_bytes_in_use": 600}, 250),
        ({"bytes_limit": 1000, "peak_bytes_in_use": 990}, -40),
    ],
)
def test_what_a_step_at_its_peak_leaves_free(stats, expected):
    device = SimpleNamespace(memory_stats=lambda: stats)
    assert snapshot._free_device_bytes(device) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["device", "pinned_host"], True), (["device", "unpinned_host"], False), ([], False)],
)
def test_pinned_memory_is_looked_for(kinds, expected):
    memories = [SimpleNamespace(kind=kind) for kind in kinds]
    assert snapshot.has_pinned_host(SimpleNamespace(addressable_memories=lambda: memories)) is expected


# The same through Orbax, with little host memory: the budget is drawn on in the background.


@pytest.mark.parametrize("free_mib", [None, 0, 1])
def test_a_save_on_every_backend_restores(backend, monkeypatch, tmp_path, free_mib):
    if free_mib is not None:
        monkeypatch.setattr(snapshot, "_free_device_bytes", lambda device: free_mib * MIB)
    rng = np.random.default_rng(1)
    wanted = {f"x{i}": random_array(rng, (1024, 320), np.float32) for i in range(4)}
    wanted["h"] = random_array(rng, (7,), np.float64)
    state = {k: on_mesh(v, MESH, "a") if k != "h" else v for k, v in wanted.items()}
    timelines = []
    options = lazy_orbax.LazyOptions(
        host_bytes=2 * MIB, slab_bytes=MIB, on_timeline=timelines.append
    )
    with ocp.Checkpointer(lazy_orbax.pytree_handler(options=options)) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(state))
    with ocp.PyTreeCheckpointer() as stock:
        found = stock.restore(
            tmp_path / "1",
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        )
    assert_same(found, wanted)
    (timeline,) = timelines
    expected = "stage"
    if not backend.in_host_memory and free_mib is not None:
        expected = "direct" if free_mib == 0 else "stage+direct"
    assert timeline.mode == expected
    assert timeline.error is None
    assert timeline.bytes_written == sum(x.nbytes for x in wanted.values())
