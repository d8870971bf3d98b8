"""Digests: what they cover, what they find, and what is done about it."""

import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import abstract, assert_same, on_mesh, random_array
from faults import flips
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax import _paths
from lazy_orbax.errors import CorruptCheckpointError, OptionError, Problem, RestoreError
from lazy_orbax.integrity import (
    digest,
    digest_file,
    digest_in_parts,
    step_metadata,
    stored_item,
    verify,
)
from lazy_orbax.integrity.digest_file import DIRECTORY, DigestError, parse
from lazy_orbax.restore import compare_arrays, source
from lazy_orbax.snapshot import host_copies
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.files import ItemFiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("restores_that_fail"),
]
DIGESTS = f"{DIRECTORY}/process_0"


def manager_of(directory, timelines=None, **keywords):
    options = keywords.pop("options", {})
    if timelines is not None:
        options = {**options, "on_timeline": timelines.append}
    handler = lazy_orbax.pytree_handler(options=lazy_orbax.LazyOptions(**options), **keywords)
    return ocp.CheckpointManager(directory, item_handlers=handler)


def save_steps(directory, trees, **keywords):
    with manager_of(directory, **keywords) as manager:
        for step, tree in enumerate(trees, 1):
            manager.save(step, args=ocp.args.PyTreeSave(tree))
            manager.wait_until_finished()


def restore_args(tree, *, by_orbax=False):
    """What is restored. What may be cut or padded goes the way of Orbax."""
    args = ocp.checkpoint_utils.construct_restore_args(abstract(tree), strict=not by_orbax)
    return ocp.args.PyTreeRestore(abstract(tree), restore_args=args)


def flip_chunk(directory, leaf, step, at=100):
    """Flips a bit of a chunk of a leaf that is stored as plain files."""
    (file,) = [f for f in (directory / str(step) / "default" / leaf).iterdir() if f.name == "0.0"]
    content = bytearray(file.read_bytes())
    content[at] ^= 8
    file.write_bytes(content)
    return file


def state_of(seed, mesh):
    rng = np.random.default_rng(seed)
    return {
        "w": on_mesh(random_array(rng, (16, 64), np.float32), mesh, "a"),
        "v": on_mesh(random_array(rng, (64, 16), np.float32), mesh, "b"),
        "n": 3,
    }


# Digests


def test_a_digest_is_of_the_elements_in_c_order():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert digest.digest_of(array) == digest.digest_of_bytes(array.tobytes())
    assert digest.digest_of(array.T) == digest.digest_of_bytes(array.T.tobytes())
    assert digest.digest_of(array[:, 1:3]) == digest.digest_of_bytes(array[:, 1:3].tobytes())
    assert digest.digest_of(np.float32(3)[()].reshape(())) != digest.digest_of(np.float32([2]))
    # What is not stored of an int4 does not count.
    nibbles = np.array([1, 13, 15], np.uint8)
    padded = nibbles | np.array([0, 240, 240], np.uint8)
    assert digest.digest_of(nibbles.view(jnp.int4)) == digest.digest_of(padded.view(jnp.int4))


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (3, 5, 4), (1, 64), (64, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("limit_bytes", [1, 16, 48, 10**6])
@pytest.mark.parametrize("chunk_rows", [None, 1, 2])
def test_parts_follow_each_other_in_c_order(shape, limit_bytes, chunk_rows):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    chunk = None if chunk_rows is None or not shape else (chunk_rows, *shape[1:])
    parts = list(digest.parts(shape, 4, limit_bytes, chunk))
    joined = b"".join(array[part.index].tobytes() for part in parts)
    assert joined == array.tobytes()
    largest = max(array[part.index].nbytes for part in parts)
    assert largest <= max(4, limit_bytes) * (4 if chunk else 1)


def test_the_file_of_digests_says_what_was_written(tmp_path, mesh):
    save_steps(tmp_path, [state_of(0, mesh)])
    content = (tmp_path / "1" / "default" / DIGESTS).read_bytes()
    found = parse(content)
    assert (found.step, found.process, found.processes) == (1, 0, (0,))
    assert {leaf.name: (leaf.dtype, leaf.shape) for leaf in found.leaves} == {
        "n": ("int64", ()),
        "v": ("float32", (64, 16)),
        "w": ("float32", (16, 64)),
    }
    assert set(found.files) == {"_METADATA", "_sharding", "array_metadatas/process_0"}
    for at in range(len(content)):
        broken = bytearray(content)
        broken[at] ^= 1
        with pytest.raises(DigestError):
            parse(bytes(broken))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("leaves", [["w", "float32", [4], [[[3], [2]]]]]),
        ("leaves", [["w", "float32", [4], [[[-1], [2]]]]]),
        ("leaves", [["w", "float32", [4], [[[0, 0], [2, 1]]]]]),
        ("leaves", 3),
        ("pieces", "zz"),
        ("pieces", ""),
        ("driver", "file"),
        ("format", 2),
        ("files", {"_METADATA": 1}),
    ],
)
def test_a_file_of_digests_that_makes_no_sense_is_refused(tmp_path, mesh, field, value):
    save_steps(tmp_path, [state_of(0, mesh)])
    file = tmp_path / "1" / "default" / DIGESTS
    content = json.loads(file.read_bytes())
    del content["digest"]
    body = json.dumps({**content, field: value}).encode()[1:]
    made = b'{"digest":"%016x",' % digest.digest_of_bytes(body) + body
    with pytest.raises(DigestError):
        parse(made)
    file.write_bytes(made)
    assert [p.file for p in lazy_orbax.verify(tmp_path).all_problems] == [DIGESTS]


def test_stock_orbax_restores_what_has_digests(tmp_path, mesh):
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        assert_same(manager.restore(1, args=restore_args(state)), state)


# Restore


@pytest.fixture(params=["in host memory", "in memory of its own"])
def device_memory(request, monkeypatch):
    """Where the device keeps arrays: they are looked at where they are, or copied."""
    if request.param == "in memory of its own":
        monkeypatch.setattr(host_copies, "view_of", lambda array: None)


@pytest.mark.usefixtures("device_memory")
def test_restore_finds_what_changed_on_the_way(tmp_path, mesh, monkeypatch):
    """The storage is right, and so is a second reading: only the arrays tell."""
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])
    base = lazy_orbax.LazyCheckpointHandler.__mro__[1]
    original = base.restore

    def broken(self, *args, **kwargs):
        value = original(self, *args, **kwargs)
        host = np.array(value["w"])
        host.view(np.uint32)[9, 5] ^= 1 << 20
        return {**value, "w": jax.device_put(host, value["w"].sharding)}

    monkeypatch.setattr(base, "restore", broken)
    with manager_of(tmp_path) as manager, pytest.raises(CorruptCheckpointError) as caught:
        manager.restore(1, args=restore_args(state, by_orbax=True))
    error = caught.value
    assert error.leaf == "w"
    assert error.index is not None
    assert error.index.startswith(("[8:", "[9:"))
    assert "on the way" in str(error)
    options = {"verify_restore": False}
    with manager_of(tmp_path, options=options) as manager:
        manager.restore(1, args=restore_args(state, by_orbax=True))


def test_restore_finds_what_changed_while_it_was_read(tmp_path, mesh, monkeypatch):
    """The storage is right, and so is a second reading: only the bytes that were read tell."""
    # So large that no chunk lies in the tree of the database itself.
    state = {"w": on_mesh(random_array(np.random.default_rng(0), (64, 64), np.float32), mesh, "a")}
    save_steps(tmp_path, [state])
    read = source.Directory._read

    def broken(self, file, start, buffers, wanted):
        read(self, file, start, buffers, wanted)
        buffers[0][0] ^= 4

    monkeypatch.setattr(source.Directory, "_read", broken)
    with manager_of(tmp_path) as manager, pytest.raises(CorruptCheckpointError) as caught:
        manager.restore(1, args=restore_args(state))
    assert caught.value.leaf in state
    assert "on the way" in str(caught.value)
    with manager_of(tmp_path, options={"verify_restore": False}) as manager:
        manager.restore(1, args=restore_args(state))


@pytest.mark.usefixtures("device_memory")
def test_nothing_stays_cached_on_what_was_restored(tmp_path, mesh):
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])
    with manager_of(tmp_path) as manager:
        found = manager.restore(1, args=restore_args(state))
    for leaf in (found["w"], found["v"]):
        assert leaf._npy_value is None
        assert all(shard.data._npy_value is None for shard in leaf.addressable_shards)


def test_a_restore_is_verified_where_pinned_memory_is_refused(tmp_path, mesh, monkeypatch, caplog):
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])

    def refuse(sharding):
        raise RuntimeError("RESOURCE_EXHAUSTED: pinned pool")

    monkeypatch.setattr(host_copies, "in_pinned_host", refuse)
    monkeypatch.setattr(host_copies, "view_of", lambda array: None)  # As on an accelerator.
    with manager_of(tmp_path) as manager:
        assert_same(manager.restore(1, args=restore_args(state, by_orbax=True)), state)
    assert "pageable" in caplog.text


OTHER_FORMS = {
    "other shards": lambda x, mesh: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, ("a", "b")))
    ),
    "other dtype": lambda x, mesh: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
    "integers": lambda x, mesh: jax.ShapeDtypeStruct(x.shape, jnp.int32, sharding=x.sharding),
    "larger": lambda x, mesh: jax.ShapeDtypeStruct(
        (x.shape[0] + 8, x.shape[1]), x.dtype, sharding=x.sharding
    ),
    "smaller": lambda x, mesh: jax.ShapeDtypeStruct(
        (x.shape[0] - 4, x.shape[1]), x.dtype, sharding=x.sharding
    ),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_what_is_restored_in_another_form_is_verified(tmp_path, mesh, form):
    rng = np.random.default_rng(0)
    state = {"w": on_mesh(random_array(rng, (16, 64), np.float32), mesh, "a", "b")}
    save_steps(tmp_path, [state], use_ocdbt=False)
    target = {"w": OTHER_FORMS[form](state["w"], mesh)}
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    arguments["w"].strict = False
    args = ocp.args.PyTreeRestore(target, restore_args=arguments)
    with manager_of(tmp_path, use_ocdbt=False) as manager:
        assert manager.restore(1, args=args)["w"].dtype == target["w"].dtype
        file = flip_chunk(tmp_path, "w", 1)
        with pytest.raises(CorruptCheckpointError) as caught:
            manager.restore(1, args=args)
    assert caught.value.leaf == "w"
    assert str(caught.value.file) in str(file)


def test_a_piece_that_nobody_here_has_whole_is_compared(mesh, tmp_path):
    """As with several processes, each of which has a part of a piece."""
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])
    item = stored_item.StoredItem(str(tmp_path / "1" / "default"))
    host = np.array(state["w"])
    narrow = on_mesh(host, mesh, None, ("a", "b"))
    assert compare_arrays.check_restored(item, {"w": narrow}) == []
    host.view(np.uint32)[3, 7] ^= 1
    (problem,) = compare_arrays.check_restored(item, {"w": on_mesh(host, mesh, None, ("a", "b"))})
    assert (problem.leaf, "on the way" in problem.what) == ("w", True)


def test_leaves_that_are_not_restored_are_not_read(tmp_path, mesh):
    state = state_of(0, mesh)
    save_steps(tmp_path, [state], use_ocdbt=False)
    flip_chunk(tmp_path, "w", 1)
    target = {**abstract(state), "w": ocp.PLACEHOLDER}
    args = ocp.args.PyTreeRestore(target)
    with manager_of(tmp_path, use_ocdbt=False) as manager:
        assert_same(manager.restore(1, args=args)["v"], np.array(state["v"]))


def test_a_changed_string_is_named(tmp_path, mesh):
    state = {**state_of(0, mesh), "motto": {"de": "grüße"}}
    save_steps(tmp_path, [state])
    assert lazy_orbax.verify(tmp_path).ok
    file = tmp_path / "1" / "default" / "_strings.json"
    file.write_text(file.read_text().replace("e", "f"))
    assert not lazy_orbax.verify(tmp_path).ok
    with manager_of(tmp_path) as manager, pytest.raises(CorruptCheckpointError) as caught:
        manager.restore(1, args=restore_args(state))
    assert (caught.value.leaf, caught.value.file) == ("motto.de", "_strings.json")


def test_a_pipe_in_the_place_of_a_file_is_not_read(tmp_path, mesh):
    save_steps(tmp_path, [{**state_of(0, mesh), "motto": "right"}])
    file = tmp_path / "1" / "default" / "_strings.json"
    file.unlink()
    os.mkfifo(file)
    item = stored_item.StoredItem(str(file.parent))
    assert [problem.what for problem in item.check_files()] == ["is missing"]
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    file.unlink()
    os.mkfifo(file)
    found = [str(problem) for problem in lazy_orbax.verify(tmp_path).problems]
    assert any("_CHECKPOINT_METADATA" in problem for problem in found)


def test_a_string_that_was_read_wrongly_is_named(tmp_path, mesh):
    save_steps(tmp_path, [{**state_of(0, mesh), "motto": "right"}])
    item = stored_item.StoredItem(str(tmp_path / "1" / "default"))
    assert compare_arrays.check_restored(item, {"motto": "right"}) == []
    (problem,) = compare_arrays.check_restored(item, {"motto": "wrong"})
    assert problem.leaf == "motto"


def test_a_checkpoint_without_digests_restores_as_before(tmp_path, mesh):
    state = state_of(0, mesh)
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(state))
    with manager_of(tmp_path) as manager:
        assert_same(manager.restore(1, args=restore_args(state)), state)
    report = lazy_orbax.verify(tmp_path)
    assert report.ok
    assert not report.is_whole
    assert report.items[0].not_covered


def test_a_misfit_of_the_target_is_no_corruption(tmp_path, mesh):
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])
    with manager_of(tmp_path) as manager:
        with pytest.raises(RestoreError, match="w"):
            manager.restore(1, args=restore_args({**state, "w": jnp.zeros((8, 64))}))
        with pytest.raises(RestoreError, match="w"):
            lazy_orbax.restore_latest_good(
                manager, args=restore_args({**state, "w": jnp.zeros((8, 64))})
            )


# The metadata of a step


def by_manager(root, state, **options):
    handlers = {"state": lazy_orbax.standard_handler(), "data": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(**options)
    with ocp.CheckpointManager(root, item_handlers=handlers, options=options) as manager:
        args = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave({"at": 7})}
        args = ocp.args.Composite(**args)
        manager.save(1, args=args, custom_metadata={"epoch": 12, "note": "grüße"})
    return root / "1", root / "1" / "state"


def by_manager_at_once(root, state):
    return by_manager(root, state, enable_async_checkpointing=False)


def by_async_checkpointer(root, state):
    with ocp.AsyncCheckpointer(lazy_orbax.standard_handler()) as checkpointer:
        args = ocp.args.StandardSave(state)
        checkpointer.save(root / "1", args=args, custom_metadata={"epoch": 12})
    return root / "1", root / "1"


def by_checkpointer(root, state):
    with ocp.Checkpointer(lazy_orbax.standard_handler()) as checkpointer:
        args = ocp.args.StandardSave(state)
        checkpointer.save(root / "1", args=args, custom_metadata={"epoch": 12})
    return root / "1", root / "1"


@pytest.mark.parametrize(
    "save", [by_manager, by_manager_at_once, by_async_checkpointer, by_checkpointer]
)
def test_a_flip_in_the_metadata_of_a_step_is_told_of(tmp_path, mesh, save, caplog):
    state = state_of(0, mesh)
    step, item = save(tmp_path / "run", state)
    assert lazy_orbax.verify(step).is_whole
    file, late = step / _paths.STEP_METADATA, "commit_timestamp_nsecs"
    whole = file.read_bytes()
    wanted, told = json.loads(whole), 0
    for at in range(len(whole)):
        with flips.flipped(file, at, at % 8):
            problems = step_metadata.check(str(item), str(step))
            told += bool(problems)
            if not problems:  # An escape sequence in capitals, or the time of the commit.
                assert {**json.loads(file.read_bytes()), late: 0} == {**wanted, late: 0}
            assert {problem.file for problem in problems} <= {_paths.STEP_METADATA}
    assert told > 0.8 * len(whole)
    with flips.flipped(file, whole.index(b'"epoch": 12') + len('"epoch": 1'), 0):
        report = lazy_orbax.verify(tmp_path / "run" if save is by_manager else step)
        assert "custom_metadata is not what was saved" in str(report)
        assert not report.ok
        with ocp.Checkpointer(lazy_orbax.standard_handler()) as checkpointer, caplog.at_level(30):
            args = ocp.args.StandardRestore(abstract(state))
            assert_same(checkpointer.restore(item, args=args), state)
        assert f"{_paths.STEP_METADATA}: custom_metadata is not what was saved" in caplog.text
        assert step_metadata.DIGESTS in caplog.text


def test_metadata_that_were_changed_on_purpose_refuse_nothing(tmp_path, mesh, caplog):
    state = state_of(0, mesh)
    step, item = by_manager(tmp_path / "run", state)
    store = ocp.metadata.metadata_store(enable_write=True, blocking_write=True)
    store.update(step / _paths.STEP_METADATA, custom_metadata={"epoch": 13})
    with ocp.CheckpointManager(
        tmp_path / "run", item_handlers={"state": lazy_orbax.standard_handler()}
    ) as manager:
        assert manager.metadata(1).custom_metadata == {"epoch": 13}
        target = ocp.args.StandardRestore(abstract(state))
        good = lazy_orbax.restore_latest_good(manager, args=ocp.args.Composite(state=target))
        assert_same(good.value["state"], state)
        assert "changed on purpose" in caplog.text
        # What the message says to do; as in a step that has no such digests.
        (item / step_metadata.DIGESTS).unlink()
        assert lazy_orbax.verify(step).is_whole
        caplog.clear()
        manager.restore(1, args=ocp.args.Composite(state=target))
        assert "purpose" not in caplog.text
    # An item that was copied alone.
    shutil.copytree(by_checkpointer(tmp_path / "other", state)[1], tmp_path / "alone" / "item")
    (tmp_path / "alone" / "item" / _paths.STEP_METADATA).unlink()
    place = place_of(str(tmp_path / "alone" / "item"))
    assert step_metadata.check_beside(ItemFiles(place)) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100000, b'{"format": 2}', b"[]"])
def test_digests_of_a_step_that_make_no_sense(tmp_path, mesh, content):
    step, item = by_checkpointer(tmp_path / "run", state_of(0, mesh))
    (item / step_metadata.DIGESTS).write_bytes(digest_file.seal(content))
    (problem,) = step_metadata.check(str(item), str(step))
    assert problem.file == step_metadata.DIGESTS


# verify


def test_verify_names_leaf_range_file_and_newest_whole_step(tmp_path, mesh):
    trees = [state_of(step, mesh) for step in range(3)]
    save_steps(tmp_path, trees, use_ocdbt=False)
    file = flip_chunk(tmp_path, "v", 3)
    report = lazy_orbax.verify(tmp_path)
    assert [item.directory[-9:] for item in report.items] == [f"{n}/default" for n in (1, 2, 3)]
    (problem,) = report.all_problems
    assert (problem.leaf, problem.file) == ("v", "v/0.0")
    assert str(problem.file) in str(file)
    assert "leaf v[0:" in str(report)
    with (
        manager_of(tmp_path, use_ocdbt=False) as manager,
        pytest.raises(CorruptCheckpointError) as caught,
    ):
        manager.restore(3, args=restore_args(trees[2]))
    assert caught.value.newest_whole_step == 2
    assert "newest step that is whole is 2" in str(caught.value)
    for text in ("leaf v[0:", "v/0.0"):
        assert text in str(caught.value)


def test_the_search_for_a_whole_step_ends_in_time(tmp_path, mesh, monkeypatch):
    trees = [state_of(step, mesh) for step in range(4)]
    save_steps(tmp_path, trees, use_ocdbt=False)
    for step in (3, 4):
        flip_chunk(tmp_path, "v", step)
    clock, read = [0.0], []
    check_pieces = stored_item.StoredItem.check_pieces

    def slowly(self, pieces, contents=None):
        for piece in pieces:
            clock[0] += 25
            read.append((self.directory[-9:], piece.leaf))
            yield from check_pieces(self, [piece])

    monkeypatch.setattr(verify, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(stored_item.StoredItem, "check_pieces", slowly)
    item = tmp_path / "4" / "default"
    with pytest.raises(CorruptCheckpointError) as caught:
        verify.raise_corrupt(str(item), [Problem("broken")], look=True)
    assert caught.value.newest_whole_step is None
    assert "Not all were looked at" in str(caught.value)
    assert "lazy-orbax verify" in str(caught.value)
    assert len(read) == 3
    clock[0] = 1e9  # A search has its own time; with enough of it, it finds the step.
    monkeypatch.setattr(verify, "_SEARCH_S", 1e9)
    assert verify.newest_whole_step(str(item)) == 2


@pytest.mark.parametrize("form", flips.FORMS)
def test_large_pieces_are_read_in_parts(tmp_path, mesh, form, monkeypatch):
    monkeypatch.setattr(digest_in_parts, "PART_BYTES", 1000)
    monkeypatch.setattr(stored_item, "_BATCH_BYTES", 1000)
    saved = flips.save(tmp_path / "run", form, mesh)
    report = lazy_orbax.verify(saved.directory)
    assert report.is_whole, str(report)
    files = [
        f
        for kind, fs in saved.files().items()
        if kind in ("chunk", "ocdbt.process_0/d/*")
        for f in fs
    ]
    largest = max(files, key=lambda file: file.stat().st_size)
    size = largest.stat().st_size
    found = []
    # A database may leave bytes that nothing refers to anywhere in a file: several are flipped.
    for at in (size // 5, size // 3, size // 2, 2 * size // 3, size - 60):
        with flips.flipped(largest, at, 3):
            found.append(not lazy_orbax.verify(saved.directory).ok)
    assert any(found)
    if "ocdbt" not in form:
        assert all(found)


def test_memory_of_verify_does_not_depend_on_the_size_of_a_leaf(tmp_path):
    """A leaf of 320 MiB in one chunk: not even that is in memory as a whole."""
    save_steps(tmp_path, [{"w": np.zeros((320, 2**18), np.float32) + 1}])
    script = (
        "import resource, sys, lazy_orbax\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = lazy_orbax.verify(sys.argv[1])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert report.is_whole, report\n"
        "print(after - before)\n"
    )
    # A platform that does not exist: JAX would fail if it were asked for devices.
    variables = {**os.environ, "JAX_PLATFORMS": "none_at_all"}
    grown_kib = subprocess.check_output(
        [sys.executable, "-c", script, str(tmp_path)], env=variables, text=True, timeout=120
    )
    assert int(grown_kib) < 240 * 2**10, grown_kib


def break_step(directory, how, mesh):
    """Breaks the newest step, which is 3, in some way."""
    item = directory / "3" / "default"
    if how == "chunk":
        flip_chunk(directory, "w", 3)
    elif how == "empty step metadata":
        (directory / "3" / "_CHECKPOINT_METADATA").write_bytes(b"")
        (item / "_METADATA").write_bytes(b"")
    elif how == "no item":
        shutil.rmtree(item)
    elif how == "chunk missing":
        next((item / "w").glob("0.*")).unlink()
    elif how == "array metadata missing":
        (item / "w" / ".zarray").unlink()
    elif how == "tree metadata missing":
        (item / "_METADATA").unlink()
    elif how == "digests of another process missing":
        file = item / DIGESTS
        content = json.loads(file.read_bytes())
        del content["digest"]
        body = json.dumps({**content, "processes": [0, 1]}).encode()[1:]
        file.write_bytes(b'{"digest":"%016x",' % digest.digest_of_bytes(body) + body)
    elif how == "everything empty":
        for file in item.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")


BREAKS = [
    "chunk",
    "empty step metadata",
    "no item",
    "chunk missing",
    "array metadata missing",
    "tree metadata missing",
    "digests of another process missing",
    "everything empty",
]


@pytest.mark.parametrize("how", BREAKS)
def test_the_latest_good_step_is_restored(tmp_path, mesh, how, caplog):
    trees = [state_of(step, mesh) for step in range(3)]
    save_steps(tmp_path, trees, use_ocdbt=False)
    break_step(tmp_path, how, mesh)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    assert not lazy_orbax.verify(tmp_path / "3").ok
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with manager_of(tmp_path, use_ocdbt=False) as manager:
        found = lazy_orbax.restore_latest_good(manager, args=restore_args(trees[0]))
    assert found.step == 2
    assert_same(found.value, trees[1])
    assert {skipped.step for skipped in found.skipped} == {3, 4}
    assert all(skipped.why for skipped in found.skipped)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert any("Step 3 is passed over" in message for message in caplog.messages)


def test_an_empty_manifest_is_passed_over(tmp_path, mesh):
    trees = [state_of(step, mesh) for step in range(2)]
    save_steps(tmp_path, trees)
    (tmp_path / "2" / "default" / "manifest.ocdbt").write_bytes(b"")
    with manager_of(tmp_path) as manager:
        found = lazy_orbax.restore_latest_good(manager, args=restore_args(trees[0]))
    assert found.step == 1
    assert "manifest.ocdbt" in found.skipped[0].why


def test_no_good_step_lists_all_of_them(tmp_path, mesh):
    trees = [state_of(step, mesh) for step in range(2)]
    save_steps(tmp_path, trees, use_ocdbt=False)
    for step in (1, 2):
        flip_chunk(tmp_path, "w", step)
    with (
        manager_of(tmp_path, use_ocdbt=False) as manager,
        pytest.raises(CorruptCheckpointError) as caught,
    ):
        lazy_orbax.restore_latest_good(manager, args=restore_args(trees[0]))
    for step in (1, 2):
        assert f"{tmp_path}/{step}" in str(caught.value)
    with manager_of(tmp_path / "empty") as manager, pytest.raises(FileNotFoundError):
        lazy_orbax.restore_latest_good(manager)


def test_a_mistake_in_the_args_is_not_taken_for_a_broken_step(tmp_path, mesh):
    trees = [state_of(step, mesh) for step in range(2)]
    save_steps(tmp_path, trees)
    with manager_of(tmp_path) as manager, pytest.raises(ValueError, match="StandardRestore"):
        lazy_orbax.restore_latest_good(manager, args=ocp.args.StandardRestore(abstract(trees[0])))


# Replaced leaves


def test_leaves_are_replaced_only_when_told_to(tmp_path, mesh, caplog):
    trees = [state_of(step, mesh) for step in range(3)]
    save_steps(tmp_path, trees, use_ocdbt=False)
    flip_chunk(tmp_path, "w", 3)
    args = restore_args(trees[0])
    replace = lazy_orbax.restore_replacing
    given = on_mesh(np.ones((16, 64), np.float32), mesh, "a")
    with manager_of(tmp_path, use_ocdbt=False) as manager:
        with pytest.raises(CorruptCheckpointError) as caught:
            replace(manager, 3, args=args, replacements={"v": lazy_orbax.FromStep(2)})
        assert caught.value.leaf == "w"
        found = replace(
            manager,
            3,
            args=args,
            replacements={"w": lazy_orbax.FromStep(2), "v": lazy_orbax.FromStep(1)},
        )
        assert_same(found.value, {**trees[2], "w": trees[1]["w"]})
        (record,) = found.replaced
        assert (record.leaf, record.by, found.not_needed) == ("w", "step 2", ("v",))
        assert "w/0.0" in record.why
        texts = [message for message in caplog.messages if "leaf" in message]
        assert any("leaf w is replaced by step 2" in text for text in texts)
        assert any("leaf v is as it was saved" in text for text in texts)
        found = replace(manager, 3, args=args, replacements={"w": given})
        assert_same(found.value, {**trees[2], "w": given})
        flip_chunk(tmp_path, "w", 2)
        with pytest.raises(CorruptCheckpointError):  # The other step's leaf is no better.
            replace(manager, 3, args=args, replacements={"w": lazy_orbax.FromStep(2)})


@pytest.mark.parametrize(
    ("replacements", "text"),
    [
        ({"nobody": lazy_orbax.FromStep(1)}, "nobody"),
        ({"w": np.ones((16, 63), np.float32)}, "wants"),
        ({"w": np.ones((16, 64), np.int32)}, "wants"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(tmp_path, mesh, replacements, text):
    state = state_of(0, mesh)
    save_steps(tmp_path, [state])
    with manager_of(tmp_path) as manager, pytest.raises(OptionError, match=text):
        lazy_orbax.restore_replacing(
            manager, 1, args=restore_args(state), replacements=replacements
        )


# Stale saves


def test_a_save_of_the_same_bytes_is_reported(tmp_path, mesh, caplog):
    one, other = state_of(0, mesh), state_of(1, mesh)
    timelines = []
    save_steps(tmp_path, [one, dict(one), dict(one), other, one], timelines=timelines)
    ends = [None, "1/default", "2/default", None, None]
    assert len(timelines) == len(ends)
    for timeline, end in zip(timelines, ends, strict=True):
        same_as = timeline.same_as
        assert (same_as is None) == (end is None)
        assert end is None or same_as.endswith(end)
    warnings = [text for text in caplog.messages if "very same bytes" in text]
    assert len(warnings) == 1


# The command line


def test_the_command_line(tmp_path, mesh, capsys):
    from lazy_orbax.cli.main import main

    save_steps(tmp_path, [state_of(0, mesh)], use_ocdbt=False)
    assert main(["verify", str(tmp_path)]) == 0
    assert "ok, 3 leaves" in capsys.readouterr().out
    flip_chunk(tmp_path, "w", 1)
    assert main(["verify", str(tmp_path)]) == 1
    assert "CORRUPT" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert "not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("by_orbax", [False, True])
def test_a_file_that_is_gone_is_said_as_orbax_says_it(tmp_path, mesh, by_orbax):
    """Who copies a checkpoint without its hidden files learns it from the error of either."""
    state = state_of(0, mesh)
    save_steps(tmp_path, [state], use_ocdbt=False)
    (tmp_path / "1" / "default" / "w" / ".zarray").unlink()
    for make in (lambda: ocp.CheckpointManager(tmp_path), lambda: manager_of(tmp_path)):
        with make() as manager, pytest.raises(FileNotFoundError, match="File not found:.*zarray"):
            manager.restore(1, args=restore_args(state, by_orbax=by_orbax))
    with manager_of(tmp_path) as manager, pytest.raises(CorruptCheckpointError) as caught:
        manager.restore(1, args=restore_args(state, by_orbax=by_orbax))
    assert (caught.value.leaf, caught.value.file) == ("w", "w/.zarray")
