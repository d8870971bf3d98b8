"""`skip_unchanged`: what did not change is linked; each step is whole alone, and nothing is shared
that somebody changes."""

import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.linked import save, stock_restores
from equipment.trees import on_mesh, random_array
from etils import epath
from jax.sharding import Mesh

import lazy_orbax
from lazy_orbax import LazyOptions
from lazy_orbax.errors import CorruptCheckpointError, OptionError

RNG = np.random.default_rng(11)


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("a",))


def state_of(mesh, step, *, frozen):
    """A frozen base, experts of which one is visited in a step, and what changes in each."""
    experts = np.repeat(np.arange(4.0, dtype=np.float32), 16).reshape(4, 16)
    experts[step % 4] += step
    return {
        "base": frozen,
        "experts": on_mesh(experts, mesh, "a"),
        "adapter": on_mesh(random_array(RNG, (8, 4), np.float32), mesh, "a"),
        "zeros": np.zeros((4, 4), np.float32),
        "step": step,
    }


def frozen_base(mesh):
    return on_mesh(random_array(RNG, (16, 32), np.float32), mesh, "a")


def manager_of(directory, timelines=None, *, keep=None, options=None, **keywords):
    told = timelines.append if timelines is not None else None
    handler = lazy_orbax.pytree_handler(
        options=LazyOptions(**{"skip_unchanged": True, "on_timeline": told, **(options or {})}),
        **{"use_ocdbt": False, **keywords},
    )
    kept = ocp.CheckpointManagerOptions(max_to_keep=keep)
    return ocp.CheckpointManager(directory, item_handlers=handler, options=kept)


def files_of(step):
    return {path.relative_to(step): path for path in step.rglob("*") if path.is_file()}


def shared(older, newer):
    """Paths below two steps at which both have the same file."""
    older, newer = files_of(older), files_of(newer)
    return {
        str(name) for name in older.keys() & newer if os.path.samefile(older[name], newer[name])
    }


@pytest.mark.parametrize("use_zarr3", [False, True])
def test_each_step_is_whole_when_the_others_are_gone(tmp_path, mesh, use_zarr3):
    base, timelines = frozen_base(mesh), []
    states = {step: state_of(mesh, step, frozen=base) for step in range(1, 5)}
    run = tmp_path / "run"
    with manager_of(run, timelines, use_zarr3=use_zarr3) as manager:
        for step, state in states.items():
            save(manager, step, state)
    chunk = (lambda n: f"c/{n}/0") if use_zarr3 else (lambda n: f"{n}.0")
    same = shared(run / "2", run / "3")
    assert {f"default/base/{chunk(n)}" for n in range(4)} <= same
    # Of four experts two were not visited.
    assert {f"default/experts/{chunk(n)}" for n in range(4)} & same == {
        f"default/experts/{chunk(n)}" for n in (0, 1)
    }
    assert all("/base/" in name or "/experts/" in name or "/zeros/" in name for name in same)
    n_linked = base.nbytes + states[1]["zeros"].nbytes
    assert [t.bytes_linked for t in timelines] == [0, *3 * [n_linked + 2 * 64]]
    for step, state in states.items():
        alone = tmp_path / f"alone_{step}"
        shutil.copytree(run, alone, copy_function=os.link)
        for other in states.keys() - {step}:
            shutil.rmtree(alone / f"{other}")
        stock_restores(alone, step, state)
        report = lazy_orbax.verify(alone)
        assert report.ok
        assert len(report.items) == 1


def test_retention_and_a_new_process_change_nothing(tmp_path, mesh):
    base, timelines = frozen_base(mesh), []
    for first in (1, 4):
        with manager_of(tmp_path, timelines, keep=1) as manager:  # One each, as after a restart.
            for step in range(first, first + 3):
                state = state_of(mesh, step, frozen=base)
                save(manager, step, state)
    assert [t.bytes_linked >= base.nbytes for t in timelines] == [False, *5 * [True]]
    assert [path.name for path in tmp_path.iterdir()] == ["6"]
    stock_restores(tmp_path, 6, state)


def test_no_file_that_is_shared_is_ever_changed(tmp_path, mesh):
    """Every save writes other bytes to the names that it shares with the step before."""
    base = frozen_base(mesh)
    state = {"base": base, "x": on_mesh(np.ones((4, 4), np.float32), mesh, "a")}
    with manager_of(tmp_path) as manager:
        save(manager, 1, state)
        save(manager, 2, state)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert shared(tmp_path / "1", tmp_path / "2")
        save(manager, 3, {**state, "base": base + 1})
    after = {path: path.read_bytes() for path in before}
    assert after == before
    assert not any("base" in name for name in shared(tmp_path / "2", tmp_path / "3"))


@pytest.mark.parametrize(
    "change",
    [
        {"use_compression": True},
        {"use_zarr3": True},
    ],
    ids=str,
)
def test_what_is_stored_in_another_way_is_written(tmp_path, mesh, change):
    timelines, state = [], {"base": frozen_base(mesh)}
    for step, keywords in ((1, {"use_compression": False}), (2, change), (3, change)):
        with manager_of(tmp_path, timelines, **keywords) as manager:
            save(manager, step, state)
    assert [t.bytes_linked for t in timelines] == [0, 0, state["base"].nbytes]
    stock_restores(tmp_path, 2, state)


def test_other_shapes_dtypes_and_shards_are_written(tmp_path, mesh):
    timelines, base = [], np.ones((16, 32), np.float32)
    halves = Mesh(np.array(jax.devices()[:2]), ("a",))
    states = [
        {"w": on_mesh(base, mesh, "a")},
        {"w": on_mesh(base, halves, "a")},
        {"w": on_mesh(base[:8], halves, "a")},
        {"w": on_mesh(base[:8].view(np.int32), halves, "a")},
        {"v": on_mesh(base[:8].view(np.int32), halves, "a")},
    ]
    with manager_of(tmp_path, timelines) as manager:
        for step, state in enumerate(states):
            save(manager, step, state)
    assert [t.bytes_linked for t in timelines] == [0] * 5
    for step, state in enumerate(states):
        stock_restores(tmp_path, step, state)


def damage_digests(step):
    (file,) = (step / "default" / "lazy_orbax_digests").glob("process_*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def forget_digests(step):
    shutil.rmtree(step / "default" / "lazy_orbax_digests")


def blow_up_digests(step):
    (file,) = (step / "default" / "lazy_orbax_digests").glob("process_*")
    os.truncate(file, 2**40)


def lock_digests(step):
    """Nobody can open what is its own link, whoever runs the tests."""
    (file,) = (step / "default" / "lazy_orbax_digests").glob("process_*")
    file.unlink()
    file.symlink_to(file)


def lose_chunks(step):
    for path in (step / "default" / "base").iterdir():
        if not path.name.startswith("."):
            path.unlink()


def lead_elsewhere(step):
    for path in (step / "default" / "base").iterdir():
        if not path.name.startswith("."):
            path.rename(path.with_name(f"moved_{path.name}"))
            path.symlink_to(path.with_name(f"moved_{path.name}"))


@pytest.mark.parametrize(
    "harm",
    [
        damage_digests,
        forget_digests,
        blow_up_digests,
        lock_digests,
        lose_chunks,
        lead_elsewhere,
    ],
)
def test_what_is_wrong_with_the_older_step_is_no_harm(tmp_path, mesh, harm):
    timelines, state = [], {"base": frozen_base(mesh)}
    with manager_of(tmp_path, timelines) as manager:
        save(manager, 1, state)
        harm(tmp_path / "1")
        save(manager, 2, state)
    assert timelines[-1].bytes_linked == 0
    stock_restores(tmp_path, 2, state)


def cut_off(chunk):
    os.truncate(chunk, chunk.stat().st_size // 2)


def write_in_place(chunk):
    with chunk.open("r+b") as file:
        file.write(b"other")


def write_another(chunk):
    content = chunk.read_bytes()
    chunk.unlink()
    chunk.write_bytes(content[::-1])


@pytest.mark.parametrize("change", [cut_off, write_in_place, write_another])
def test_a_chunk_that_was_changed_after_it_was_saved_is_written(tmp_path, mesh, caplog, change):
    """The digest tells what was saved, and the state is the same: only the file is another."""
    timelines, state = [], {"base": frozen_base(mesh)}
    with manager_of(tmp_path, timelines) as manager:
        save(manager, 1, state)
        chunk = tmp_path / "1" / "default" / "base" / "0.0"
        change(chunk)
        # The clock of a file system may stand still for some milliseconds.
        later_ns = max(chunk.stat().st_mtime_ns, os.stat(tmp_path / "1").st_mtime_ns) + 10**9
        os.utime(chunk, ns=(later_ns, later_ns))
        save(manager, 2, state)
    assert timelines[-1].bytes_linked == state["base"].nbytes * 3 // 4
    assert "was changed after it was saved" in caplog.text
    stock_restores(tmp_path, 2, state)
    assert lazy_orbax.verify(tmp_path / "2").ok


@pytest.mark.parametrize("error", [OSError(31, "Too many links"), OSError(18, "another disk")])
def test_what_cannot_be_linked_is_written(tmp_path, mesh, monkeypatch, error):
    """Also where some chunks of it have been linked: the older file stays as it is."""
    timelines, state, made = [], {"base": frozen_base(mesh)}, []
    link = os.link

    def some(source, name, **keywords):
        made.append(name)
        if len(made) > 2:
            raise error
        link(source, name, **keywords)

    with manager_of(tmp_path, timelines) as manager:
        save(manager, 1, state)
        before = {path: path.read_bytes() for path in (tmp_path / "1").rglob("*") if path.is_file()}
        monkeypatch.setattr(os, "link", some)
        save(manager, 2, state)
    assert timelines[-1].bytes_linked == state["base"].nbytes // 2
    assert {path: path.read_bytes() for path in before} == before
    stock_restores(tmp_path, 2, state)
    assert lazy_orbax.verify(tmp_path).ok


def test_a_flipped_bit_is_seen_in_every_step_that_shares_it(tmp_path, mesh):
    state = {"base": frozen_base(mesh)}
    with manager_of(tmp_path, use_compression=False) as manager:
        save(manager, 1, state)
        save(manager, 2, state)
        chunk = tmp_path / "1" / "default" / "base" / "0.0"
        with chunk.open("r+b") as file:
            file.write(bytes([chunk.read_bytes()[0] ^ 1]))
        args = ocp.args.PyTreeRestore(state, ocp.checkpoint_utils.construct_restore_args(state))
        for step in (1, 2):
            with pytest.raises(CorruptCheckpointError, match="base"):
                manager.restore(step, args=args)


def test_a_verified_save_is_linked_too(tmp_path, mesh):
    timelines, state = [], {"base": frozen_base(mesh)}
    with manager_of(tmp_path, timelines, options={"verify_snapshot": 1}) as manager:
        save(manager, 1, state)
        save(manager, 2, state)
    assert timelines[-1].bytes_linked == state["base"].nbytes
    assert lazy_orbax.verify(tmp_path).ok


def test_a_step_that_is_alone_links_nothing_and_no_number_is_a_bool(tmp_path, mesh):
    state = {"base": frozen_base(mesh)}
    handler = lazy_orbax.pytree_handler(options=LazyOptions(skip_unchanged=True), use_ocdbt=False)
    checkpointer = ocp.Checkpointer(handler)
    for place in (tmp_path / "alone", tmp_path / "alone_again"):  # No step: nothing is before it.
        checkpointer.save(epath.Path(place), args=ocp.args.PyTreeSave(state))
    with pytest.raises(OptionError, match="neither True nor False"):
        LazyOptions(skip_unchanged=1)
