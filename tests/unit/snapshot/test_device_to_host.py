"""Every path a slab takes from the device to the host, those of an accelerator included."""

import dataclasses
import gc
import threading
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same, on_mesh, random_array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.plan.shards import Leaf, ReplicaPolicy
from lazy_orbax.plan.slabs import Plan, Slab, make_plan
from lazy_orbax.save import in_flight
from lazy_orbax.snapshot import choose_mode as room_module
from lazy_orbax.snapshot import device_to_host, host_copies, pack, programs
from lazy_orbax.snapshot.choose_mode import Room

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
    monkeypatch.setattr(host_copies, "has_pinned_host", lambda device: pinned)
    for module in (device_to_host, room_module):
        monkeypatch.setattr(module, "is_in_host_memory", lambda slab: in_host_memory)
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
        for piece, view in device_to_host.views(plan, device_to_host.to_host(held)):
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
    room = Room(mode)
    held = [device_to_host.take(plan, slab, leaves, room.mode_for(slab)) for slab in plan.slabs]
    spoil(leaves)
    assert_same(collected(plan, held), wanted)


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_a_slab_taken_by_either_mode_says_where_it_is(backend, mode):
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plan = plan_of(leaves)
    held = device_to_host.take(plan, plan.slabs[0], leaves, mode)
    assert held.on_host == (mode == "direct" or backend.in_host_memory)
    assert device_to_host.to_host(held).on_host


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_the_next_step_may_donate_and_still_aliases(backend, mode):
    """No view of the caller's arrays is held, so donation is not turned into a copy."""
    wanted = np.arange(64 * KIB, dtype=np.float32).reshape(8, -1)
    # Computed: what device_put returns may be NumPy's own memory, which cannot be donated.
    make = jax.jit(lambda tree: [x * 1 for x in tree])
    state = make([on_mesh(wanted, MESH, "a", "b"), on_mesh(wanted, MESH, "a")])
    jax.block_until_ready(state)
    step = jax.jit(lambda tree: [x + 1 for x in tree], donate_argnums=0)
    plan = plan_of(state)
    before = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in state]
    held = [device_to_host.take(plan, slab, state, mode) for slab in plan.slabs]
    # While the copy still runs the CPU backend may give the step another buffer.
    jax.block_until_ready([x.arrays for x in held])
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
    monkeypatch.setattr(host_copies, "has_pinned_host", lambda device: pinned)
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plan = plan_of(leaves)
    held = device_to_host.stage(plan, plan.slabs[0], leaves)
    device_copy = weakref.ref(held.arrays[0])
    held = device_to_host.to_host(held)
    gc.collect()
    assert device_copy() is None
    assert len(device_to_host.views(plan, held)) == len(plan.slabs[0].pieces)


def test_staging_into_a_buffer_uses_its_memory_again():
    first, second = ([on_mesh(np.full((8, 6), i, np.float32), MESH, "a")] for i in (1, 2))
    plan = plan_of(first)
    (slab,) = plan.slabs
    held = device_to_host.stage(plan, slab, first)
    jax.block_until_ready(held.arrays)
    before = pointers(held.buffer)
    assert_same(collected(plan, [held]), [np.full((8, 6), 1, np.float32)])
    again = device_to_host.stage(plan, slab, second, held.buffer)
    assert held.buffer.is_deleted()
    assert pointers(again.buffer) == before
    assert_same(collected(plan, [again]), [np.full((8, 6), 2, np.float32)])


LARGE, SMALL = (1024, 2048), (16, 24)  # Over 8 devices: 512 KiB of 2 bytes each, and 96 bytes.


@pytest.mark.parametrize(
    "shapes", [[LARGE], [SMALL, SMALL], 16 * [LARGE], [SMALL, LARGE, SMALL, SMALL, LARGE, SMALL]]
)
def test_large_leaves_whose_type_changes_are_written_into_the_buffer_one_by_one(shapes):
    rng = np.random.default_rng(0)
    dtypes = (jnp.bfloat16, np.float16, np.int16, np.uint16)
    given = [(shape, dtypes[i % 4]) for i, shape in enumerate(shapes)]
    hosts = [[random_array(rng, *one) for one in given] for _ in range(2)]
    first, second = ([on_mesh(one, MESH, "a", "b") for one in each] for each in hosts)
    plan = plan_of(first, slab_bytes=128 * MIB)
    (slab,) = plan.slabs
    held = device_to_host.stage(plan, slab, first)
    assert_same(collected(plan, [held]), hosts[0])
    before = pointers(held.buffer)
    again = device_to_host.stage(plan, slab, second, held.buffer)
    assert pointers(again.buffer) == before
    assert_same(collected(plan, [again]), hosts[1])
    program, _ = pack.program(plan, slab, into=True)
    needed = program.compiled().memory_analysis()
    assert needed.temp_size_in_bytes < 2**14


def test_a_buffer_that_somebody_still_reads_is_not_written_over():
    first, second = ([on_mesh(np.full((8, 6), i, np.float32), MESH, "a")] for i in (1, 2))
    plan = plan_of(first)
    (slab,) = plan.slabs
    held = device_to_host.to_host(device_to_host.stage(plan, slab, first))
    kept = device_to_host.views(plan, held)
    again = device_to_host.stage(plan, slab, second, held.buffer)
    assert_same(collected(plan, [again]), [np.full((8, 6), 2, np.float32)])
    assert all((view == 1).all() for _, view in kept)


class HalfDonated:
    """An array in the middle of being donated: reading it fails, and it is not deleted yet."""

    def __init__(self, *, is_deleted_at_last):
        self.is_deleted_at_last, self.asked = is_deleted_at_last, threading.Event()

    def block_until_ready(self):
        self.asked.set()
        raise RuntimeError("deleted or donated buffer")

    def is_deleted(self):
        return self.is_deleted_at_last and not snapshot_is_donating.is_set()


snapshot_is_donating = threading.Event()


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_copy_that_is_just_being_used_again_has_arrived(is_deleted):
    array, failures = HalfDonated(is_deleted_at_last=is_deleted), []

    def wait():
        try:
            device_to_host.await_arrival(array)
        except RuntimeError as error:
            failures.append(error)

    with device_to_host._DONATING:
        snapshot_is_donating.set()
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert array.asked.wait(30)
        snapshot_is_donating.clear()
    waiter.join(30)
    assert not waiter.is_alive()
    assert bool(failures) == (not is_deleted)


class AbortedDonation:
    """An array whose donation is given up, as somebody still reads it: reading it fails once."""

    def __init__(self):
        self.attempts = 0

    def block_until_ready(self):
        self.attempts += 1
        if self.attempts == 1:
            raise RuntimeError("deleted or donated buffer")

    def is_deleted(self):
        return False


def test_a_copy_that_was_not_used_again_after_all_is_waited_for():
    array = AbortedDonation()
    device_to_host.await_arrival(array)
    assert array.attempts == 2


def test_buffers_are_of_a_kind_when_their_slabs_look_alike():
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a") for _ in range(4)]
    leaves += [on_mesh(np.ones((8, 7), np.float32), MESH, "a")]
    plan = plan_of(leaves, slab_bytes=2 * leaves[0].nbytes)
    first, second, other = (device_to_host.reusable(plan, slab) for slab in plan.slabs)
    assert first == second != other
    assert first.fresh().nbytes == plan.slabs[0].n_bytes


def test_device_memory_is_not_kept_for_the_next_save(monkeypatch):
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plan = plan_of(leaves)
    assert device_to_host.reusable(plan, plan.slabs[0]) is None
    assert device_to_host.stage(plan, plan.slabs[0], leaves).buffer is None


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_where_pinned_memory_is_refused_pageable_memory_is_used(monkeypatch, caplog, mode):
    monkeypatch.setattr(host_copies, "has_pinned_host", lambda device: True)
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    monkeypatch.setattr(host_copies, "in_pinned_host", refuse("RESOURCE_EXHAUSTED: pinned pool"))
    wanted = np.arange(48, dtype=np.float32).reshape(8, 6)
    leaves = [on_mesh(wanted, MESH, "a"), on_mesh(wanted, MESH)]
    plan = plan_of(leaves)
    held = [device_to_host.take(plan, slab, leaves, mode) for slab in plan.slabs]
    spoil(leaves)
    assert_same(collected(plan, held), [wanted, wanted])
    assert "pageable" in caplog.text


@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_another_failure_of_the_copy_is_not_hidden(monkeypatch, mode):
    monkeypatch.setattr(host_copies, "has_pinned_host", lambda device: True)
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: False)
    monkeypatch.setattr(host_copies, "in_pinned_host", refuse("INTERNAL: broken"))
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plan = plan_of(leaves)
    with pytest.raises(RuntimeError, match="broken"):
        device_to_host.to_host(device_to_host.take(plan, plan.slabs[0], leaves, mode))


def refuse(text):
    def raise_it(sharding):
        raise RuntimeError(text)

    return raise_it


def test_direct_takes_no_device_memory_without_pinned_memory(monkeypatch):
    """It waits for the copy to the host, and what it holds then is in host memory."""
    monkeypatch.setattr(host_copies, "has_pinned_host", lambda device: False)
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a", "b")]
    plan = plan_of(leaves)
    held = device_to_host.direct(plan, plan.slabs[0], leaves)
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
    held = device_to_host.to_host(device_to_host.take(plan, slab, leaves, mode))
    assert _held_bytes(held) <= slab.n_bytes


# fmt: off
NAMES = [
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32",
    "uint32", "int64", "uint64", "float4_e2m1fn", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
]
# fmt: on


def every_bit_pattern(name):
    """All of a small dtype, and random ones of others, in two dimensions: (n, 256)."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype).reshape(256, 256)
    if dtype.itemsize == 1 and ("8" in name):
        return np.tile(np.arange(256, dtype=np.uint8), (16, 1)).view(dtype)
    array = random_array(np.random.default_rng(0), (16, 256), dtype)
    if dtype.kind in "fc" and dtype.itemsize > 1:  # Half of them NaNs, with random payloads.
        parts = array[:8].view(f"f{dtype.itemsize // (1 + (dtype.kind == 'c'))}")
        integers = parts.view(f"u{parts.itemsize}")
        integers |= np.array(np.inf, parts.dtype).view(integers.dtype)
    return array


@pytest.mark.parametrize("mode", ["stage", "copy", "direct"])
@pytest.mark.parametrize("name", NAMES)
def test_every_bit_pattern_of_every_dtype_arrives(name, mode):
    wanted, n_leaves = every_bit_pattern(name), 10
    specs = [("a", "b"), ("a",), ("b",), (), (None, ("b", "a"))]
    with jax.enable_x64(wanted.dtype.itemsize >= 8):
        leaves = [on_mesh(wanted, MESH, *specs[i % len(specs)]) for i in range(n_leaves)]
        plan = plan_of(leaves, slab_bytes=64 * MIB)
        held = [device_to_host.take(plan, slab, leaves, mode) for slab in plan.slabs]
        assert_same(collected(plan, held), [wanted] * n_leaves)


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_pattern_of_a_share_arrives(name):
    wanted = every_bit_pattern(name)
    with jax.enable_x64(wanted.dtype.itemsize >= 8):
        leaves = [on_mesh(wanted, MESH)]
        plan = plan_of(leaves)
        share = dataclasses.replace(plan.layouts[0], holds_whole_shards=False)
        plan = Plan(plan.leaves, (share,), plan.slabs)
        assert_same(collected(plan, [device_to_host.direct(plan, plan.slabs[0], leaves)]), [wanted])


def test_direct_takes_only_the_share_that_this_process_writes():
    """As with eight processes of one device: each writes an eighth of what is replicated."""
    leaves = [on_mesh(np.ones((64, 64), np.float32), MESH)]
    plan = plan_of(leaves)
    (slab,) = plan.slabs
    mine = Slab(slab.kind, slab.leaves, slab.cuts, slab.pieces[:1], slab.n_bytes // 8, 0, slab.mesh)
    share = dataclasses.replace(plan.layouts[0], holds_whole_shards=False)
    held = device_to_host.direct(Plan(plan.leaves, (share,), (mine,)), mine, leaves)
    assert _held_bytes(held) <= mine.n_bytes


def _held_bytes(held):
    return sum(
        shard.data.nbytes
        for array in held.arrays
        if isinstance(array, jax.Array)
        for shard in array.addressable_shards
    ) + sum(array.nbytes for array in held.arrays if isinstance(array, np.ndarray))


def test_slabs_that_look_alike_share_a_program():
    programs.PROGRAMS.clear()
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a") for _ in range(8)]
    plans = [plan_of(leaves, slab_bytes=2 * leaves[0].nbytes) for _ in range(2)]
    used = set()
    for plan in plans:
        assert len(plan.slabs) == 4
        for slab in plan.slabs:
            device_to_host.stage(plan, slab, leaves)
            used.add(pack.program(plan, slab, into=True)[0])
    (program,) = used
    assert program.is_compiled


@pytest.mark.parametrize("into", [True, False])
def test_a_program_dies_with_the_last_plan_that_uses_it(into, monkeypatch):
    monkeypatch.setattr(device_to_host, "is_in_host_memory", lambda slab: into)
    leaves = [on_mesh(np.ones((8, 6), np.float32), MESH, "a")]
    plans = [plan_of(leaves) for _ in range(2)]
    for plan in plans:
        device_to_host.to_host(device_to_host.stage(plan, plan.slabs[0], leaves))
    program = weakref.ref(pack.program(plan, plan.slabs[0], into=into)[0])
    del plan
    plans.pop()
    gc.collect()
    assert program() is not None
    plans.pop()
    gc.collect()
    assert program() is None


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["device", "pinned_host"], True), (["device", "unpinned_host"], False), ([], False)],
)
def test_pinned_memory_is_looked_for(kinds, expected):
    memories = [SimpleNamespace(kind=kind) for kind in kinds]
    assert (
        host_copies.has_pinned_host(SimpleNamespace(addressable_memories=lambda: memories))
        is expected
    )


def fail_saves():
    for save in in_flight.saves():
        save.fail(TimeoutError("deadlock: nothing moved for ten seconds"))


# The same through Orbax, with little host memory: the budget is drawn on in the background.


@pytest.mark.parametrize("free_kib", [None, 0, 400])
def test_a_save_on_every_backend_restores(backend, monkeypatch, tmp_path, free_kib):
    if free_kib is not None:
        monkeypatch.setattr(room_module, "free_device_bytes", lambda device: free_kib * KIB)
    rng = np.random.default_rng(1)
    wanted = {f"x{i}": random_array(rng, (1024, 320), np.float32) for i in range(4)}
    wanted["h"] = random_array(rng, (7,), np.float64)
    state = {k: on_mesh(v, MESH, "a") if k != "h" else v for k, v in wanted.items()}
    timelines = []
    options = lazy_orbax.LazyOptions(
        host_bytes=2 * MIB, slab_bytes=MIB, on_timeline=timelines.append
    )
    # A deadlock of budget and queue would block here for ever: then the save is made to fail.
    watchdog = threading.Timer(10, fail_saves)
    watchdog.start()
    try:
        with ocp.Checkpointer(lazy_orbax.pytree_handler(options=options)) as checkpointer:
            checkpointer.save(tmp_path / "1", args=ocp.args.PyTreeSave(state))
    finally:
        watchdog.cancel()
    with ocp.PyTreeCheckpointer() as stock:
        found = stock.restore(
            tmp_path / "1",
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        )
    assert_same(found, wanted)
    (timeline,) = timelines
    expected = "stage"
    if not backend.in_host_memory and free_kib is not None:
        expected = "direct" if free_kib == 0 else "stage+direct"
    assert timeline.mode == expected
    assert timeline.error is None
    assert timeline.bytes_written == sum(x.nbytes for x in wanted.values())
