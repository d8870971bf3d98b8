"""When snapshots are verified, what that leaves behind, and the way back onto devices."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import abstract, assert_same, on_mesh, random_array
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.integrity import digest_file, fingerprint, proof, proof_restored, proof_subjects
from lazy_orbax.integrity.digest_file import DigestError
from lazy_orbax.integrity.stored_item import StoredItem
from lazy_orbax.plan.slabs import Plan
from lazy_orbax.restore import compare_arrays
from lazy_orbax.save.plan_cache import PLAN_CACHE


def state_of(mesh, step=0):
    rng = np.random.default_rng(step)
    return {
        "a": on_mesh(random_array(rng, (8, 6), np.float32), mesh, "a", "b"),
        "shared": on_mesh(random_array(rng, (8, 6), jnp.bfloat16), mesh, "a"),
        "all": on_mesh(random_array(rng, (3,), np.int32), mesh),
        "one": jax.device_put(random_array(rng, (5, 5), np.uint8), jax.devices()[3]),
        "weak": jnp.asarray(3.5) + step,
        "scalar": jnp.int32(step),
        "bool": on_mesh(random_array(rng, (4, 4), np.bool_), mesh, "a"),
        "tiny": on_mesh(random_array(rng, (8, 2), jnp.int4), mesh, "a"),
        "pinned": on_mesh(
            random_array(rng, (8,), np.float32), mesh, "a", memory_kind="pinned_host"
        ),
        "key": jax.random.key(step),
        "host": rng.integers(0, 9, (3, 4)),
        "number": 3,
    }


@pytest.fixture
def far_from_the_host(monkeypatch):
    """As on an accelerator: programs look at the arrays."""
    monkeypatch.setattr(proof_subjects, "is_in_host_memory", lambda sharding: False)
    PLAN_CACHE.clear()
    yield
    PLAN_CACHE.clear()


@pytest.fixture(params=[False, True], ids=["on the host", "far from the host"])
def anywhere(request):
    if request.param:
        request.getfixturevalue("far_from_the_host")


def handler_with(every, **options):
    options = lazy_orbax.LazyOptions(verify_snapshot=every, **options)
    return lazy_orbax.standard_handler(options=options)


def await_programs():
    for thread in threading.enumerate():
        if thread.name == "lazy_orbax-proof":
            thread.join(60)


def verified_steps(directory):
    return [
        int(file.parent.parent.parent.name)
        for file in sorted(directory.rglob("process_0"))
        if file.parent.name == digest_file.DIRECTORY and "proof" in json.loads(file.read_bytes())
    ]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("mode", ["stage", "direct"])
def test_every_kind_of_leaf_is_verified_and_comes_back(mesh, tmp_path, mode):
    state = state_of(mesh)
    handler = handler_with(1, mode=mode)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        args = ocp.args.StandardRestore(abstract(state))
        assert_same(manager.restore(0, args=args), state)
    assert verified_steps(tmp_path) == [0]
    stored = StoredItem(str(tmp_path / "run" / "0" / "default"))
    assert not stored.problems
    for name, leaf in stored.leaves.items():
        value = state[name]
        data = np.array(jax.random.key_data(value) if name == "key" else value)
        total = sum(leaf.fingerprints) % 2**64
        assert total == fingerprint.of_host(data, (0,) * data.ndim), name


@pytest.mark.usefixtures("anywhere")
def test_arrays_may_be_donated_at_once(mesh, tmp_path):
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    handler = handler_with(1)
    x, wanted = step(on_mesh(np.arange(2**16, dtype=np.float32), mesh, "a")), []
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        for i in range(3):
            wanted.append(np.array(jnp.copy(x)))
            places = [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
            manager.save(i, args=ocp.args.StandardSave({"x": x}))
            x = step(x)
            assert [s.data.unsafe_buffer_pointer() for s in x.addressable_shards] == places
        manager.wait_until_finished()
        for i in range(3):
            found = manager.restore(i, args=ocp.args.StandardRestore(abstract({"x": x})))
            assert np.array(found["x"]).tobytes() == wanted[i].tobytes()


@pytest.mark.parametrize(
    ("every", "verified"),
    [(0, []), (False, []), (1, [0, 1, 2, 3, 4, 5]), (True, [0, 1, 2, 3, 4, 5]), (3, [2, 5])],
)
def test_which_saves_are_verified(mesh, tmp_path, every, verified):
    """The programs are compiled when the second save began, and found by the third."""
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(every)) as manager:
        for i in range(6):
            manager.save(i, args=ocp.args.StandardSave({"x": on_mesh(np.arange(8.0), mesh, "a")}))
            manager.wait_until_finished()
            await_programs()
    assert verified_steps(tmp_path) == verified


@pytest.mark.usefixtures("far_from_the_host")
def test_who_saves_once_compiles_nothing(mesh, tmp_path, monkeypatch):
    def compiled(subjects):
        raise AssertionError

    monkeypatch.setattr(proof, "compiled", compiled)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(50)) as manager:
        manager.save(0, args=ocp.args.StandardSave(state_of(mesh)))
    assert not [t for t in threading.enumerate() if t.name == "lazy_orbax-proof"]


def test_arrays_on_the_host_need_no_programs(mesh, tmp_path, monkeypatch):
    def compiled(subjects):
        raise AssertionError

    monkeypatch.setattr(proof, "compiled", compiled)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(1)) as manager:
        manager.save(0, args=ocp.args.StandardSave(state_of(mesh)))
    assert verified_steps(tmp_path) == [0]


@pytest.mark.usefixtures("far_from_the_host")
def test_after_prewarm_the_first_save_is_verified(mesh, tmp_path):
    state, handler = state_of(mesh), handler_with(50)
    del state["pinned"]
    lazy_orbax.prewarm(handler, state, directory=tmp_path)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        for i in range(2):
            manager.save(i, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
    assert verified_steps(tmp_path) == [0]


@pytest.mark.usefixtures("far_from_the_host")
def test_programs_that_cannot_be_compiled_fail_no_save(mesh, tmp_path, monkeypatch, caplog):
    def compiled(subjects):
        raise RuntimeError("UNIMPLEMENTED")

    monkeypatch.setattr(proof, "compiled", compiled)
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(2)) as manager:
        for i in range(4):
            manager.save(i, args=ocp.args.StandardSave({"x": on_mesh(np.arange(8.0), mesh, "a")}))
            manager.wait_until_finished()
            await_programs()
        assert manager.all_steps() == [0, 1, 2, 3]
    assert caplog.text.count("Snapshots are not verified") == 1
    assert "tried again after 20 saves" in caplog.text
    assert verified_steps(tmp_path) == []


@pytest.mark.parametrize("value", [-1, 2.0, "always", None])
def test_a_value_out_of_range_is_named(value):
    with pytest.raises(OptionError, match="verify_snapshot="):
        lazy_orbax.LazyOptions(verify_snapshot=value)


def test_a_leaf_that_is_cast_is_proven_as_it_is_stored(mesh, tmp_path):
    state = {"x": on_mesh(np.arange(16, dtype=np.float32), mesh, "a")}
    save_args = {"x": ocp.SaveArgs(dtype=jnp.bfloat16)}
    handler = lazy_orbax.pytree_handler(options=lazy_orbax.LazyOptions(verify_snapshot=1))
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(state, save_args=save_args)
        checkpointer.save(tmp_path / "item", args=args)
    leaf = StoredItem(str(tmp_path / "item")).leaves["x"]
    stored = np.arange(16, dtype=jnp.bfloat16)
    assert sum(leaf.fingerprints) % 2**64 == fingerprint.of_host(stored, (0,))


# Digest files.


def test_digests_without_fingerprints_are_read(mesh, tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(0)) as manager:
        manager.save(0, args=ocp.args.StandardSave(state_of(mesh)))
    stored = StoredItem(str(tmp_path / "run" / "0" / "default"))
    assert stored.leaves
    assert all(leaf.fingerprints == () for leaf in stored.leaves.values())
    assert lazy_orbax.verify(tmp_path / "run").is_whole


def test_a_wrong_number_of_fingerprints_is_told(mesh, tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(1)) as manager:
        manager.save(0, args=ocp.args.StandardSave(state_of(mesh)))
    file = tmp_path / "run" / "0" / "default" / digest_file.DIRECTORY / "process_0"
    fields = digest_file.unseal(file.read_bytes())
    del fields["digest"]
    fields["proof"] = fields["proof"][:-16]
    content = digest_file.seal(json.dumps(fields).encode()[1:])
    with pytest.raises(DigestError, match="fingerprints for"):
        digest_file.parse(content)


# The way back.


@pytest.fixture
def saved(mesh, tmp_path):
    state = {name: leaf for name, leaf in state_of(mesh).items() if isinstance(leaf, jax.Array)}
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(1)) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
    return StoredItem(str(tmp_path / "run" / "0" / "default")), state


def test_what_was_saved_is_proven_where_it_is(saved):
    stored, state = saved
    proven = proof_restored.look(stored.leaves, state)
    assert proven.right == set(state) - {"pinned"}
    assert not proven.wrong


@pytest.mark.parametrize(
    "sharding",
    [
        lambda mesh: NamedSharding(mesh, P("b")),
        lambda mesh: NamedSharding(mesh, P()),
        lambda mesh: NamedSharding(mesh, P(None, "b")),
        lambda mesh: NamedSharding(Mesh(np.array(jax.devices()[:8]), "x"), P("x")),
        lambda mesh: SingleDeviceSharding(jax.devices()[2]),
    ],
)
def test_another_sharding_has_the_same_sum(saved, mesh, sharding):
    stored, state = saved
    array = jax.device_put(np.array(state["a"]), sharding(mesh))
    assert proof_restored.look(stored.leaves, {"a": array}).right == {"a"}
    changed = np.array(array)
    changed.view(np.uint8)[5, 3] ^= 1
    wrong = jax.device_put(changed, sharding(mesh))
    assert set(proof_restored.look(stored.leaves, {"a": wrong}).wrong) == {"a"}


def with_one_wrong(array, device, change):
    shards = [
        jax.device_put(change(np.array(shard.data)), shard.device)
        if shard.device == device
        else shard.data
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def test_a_wrong_replica_is_found_on_its_device(saved, mesh, monkeypatch):
    """The digests look at one replica of each shard, and may take a right one."""
    stored, state = saved
    device = mesh.devices[2, 1]
    wrong = with_one_wrong(state["all"], device, lambda data: data + 1)
    assert compare_arrays.check_restored(stored, {"all": wrong}) == []
    found = proof_restored.look(stored.leaves, {"all": wrong}).wrong
    assert str(device) in found["all"]
    monkeypatch.setattr(compare_arrays, "far_from_the_host", dict)  # As on an accelerator.
    (problem,) = compare_arrays.check_restored(stored, {"all": wrong})
    assert (problem.leaf, str(device) in problem.what) == ("all", True)


def test_shards_in_each_others_place_are_found(saved, mesh):
    stored, state = saved
    data = [shard.data for shard in state["a"].addressable_shards]
    devices = [shard.device for shard in state["a"].addressable_shards]
    moved = [jax.device_put(x, d) for x, d in zip([*data[1:], data[0]], devices, strict=True)]
    wrong = jax.make_array_from_single_device_arrays((8, 6), state["a"].sharding, moved)
    found = proof_restored.look(stored.leaves, {"a": wrong})
    assert not found.right
    assert found.wrong["a"].count("on ") == 8


def test_a_restore_is_verified_where_the_arrays_are(mesh, tmp_path, monkeypatch):
    """As on an accelerator: nothing is brought to the host."""
    state = {name: leaf for name, leaf in state_of(mesh).items() if name in ("a", "shared", "all")}
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler_with(1)) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        monkeypatch.setattr(compare_arrays, "far_from_the_host", dict)
        looked = []
        on_host = compare_arrays._on_host
        monkeypatch.setattr(compare_arrays, "_on_host", lambda p: on_host(looked.extend(p) or p))
        args = ocp.args.StandardRestore(abstract(state))
        assert_same(manager.restore(0, args=args), state)
        assert looked == []


@pytest.mark.usefixtures("far_from_the_host")
def test_a_compiler_that_failed_once_is_asked_again(mesh, tmp_path, monkeypatch):
    """Only what the plan says wrongly of a leaf stays wrong."""
    original, failures = proof.compiled, [RuntimeError("no memory for the compiler")]

    def compiled(subjects):
        if failures:
            raise failures.pop()
        return original(subjects)

    monkeypatch.setattr(proof, "compiled", compiled)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler_with(1)) as manager:
        with pytest.raises(SaveError, match="no memory for the compiler"):
            manager.save(0, args=ocp.args.StandardSave(state_of(mesh)))
        manager.save(1, args=ocp.args.StandardSave(state_of(mesh, 1)))
    assert verified_steps(tmp_path) == [1]


@pytest.mark.usefixtures("far_from_the_host")
def test_programs_that_could_not_be_compiled_in_the_background_are_tried_again(
    mesh, tmp_path, monkeypatch
):
    original, failures = proof.compiled, [RuntimeError("no memory for the compiler")]

    def compiled(subjects):
        if failures:
            raise failures.pop()
        return original(subjects)

    monkeypatch.setattr(proof, "compiled", compiled)
    monkeypatch.setattr(proof, "_LATER", 2)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler_with(2)) as manager:
        for i in range(6):
            manager.save(i, args=ocp.args.StandardSave(state_of(mesh, i)))
            manager.wait_until_finished()
            await_programs()
    assert verified_steps(tmp_path) == [4]


def test_who_is_stopped_while_it_compiles_goes_on_where_it_was(monkeypatch):
    """Handlers that are made and closed for each save would never come to an end."""
    begun = []

    def compiled(subjects):
        begun.append(subjects)
        yield from "abc"

    monkeypatch.setattr(proof, "compiled", compiled)
    monkeypatch.setattr(proof, "subjects_of", lambda plan: ({0: "far"}, {}))
    plan, prover = Plan((), (), ()), proof.Prover()
    while not prover.is_ready:
        assert prover.prepare(plan, goes_on=lambda: False) in ([], list("abc"))
    assert prover.prepare(plan) == list("abc")
    assert len(begun) == 1


def test_where_there_is_no_thread_to_compile_in_the_next_save_begins(monkeypatch):
    def out_of_threads(_thread):
        raise RuntimeError("can't start new thread")

    plan, prover = Plan((), (), ()), proof.Prover()
    prover.note_save(2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", out_of_threads)
        prover.begin_to_prepare(plan, 2, lower_priority=lambda: None)
    prover.stop()
    assert not prover.is_ready
    prover.begin_to_prepare(plan, 2, lower_priority=lambda: None)
    await_programs()
    assert prover.is_ready
