"""`skip_unchanged` in OCDBT databases: references to files that are linked. Each step is whole
alone, no shared file is changed, and what is dead in them is bounded."""

import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from equipment.linked import save, stock_restores
from equipment.trees import assert_same, on_mesh, random_array
from jax.sharding import Mesh

import lazy_orbax
from lazy_orbax import LazyOptions
from lazy_orbax.errors import CorruptCheckpointError, SaveError
from lazy_orbax.integrity.digest_file import DigestTemplate
from lazy_orbax.save import item_stores, writer

RNG = np.random.default_rng(12)


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("a",))


@pytest.fixture
def base(mesh):
    return on_mesh(random_array(RNG, (64, 256), np.float32), mesh, "a")


def manager_of(directory, timelines=None, *, keep=None, **keywords):
    told = timelines.append if timelines is not None else None
    options = LazyOptions(skip_unchanged=True, on_timeline=told)
    handler = lazy_orbax.pytree_handler(options=options, **keywords)
    kept = ocp.CheckpointManagerOptions(max_to_keep=keep)
    return ocp.CheckpointManager(directory, item_handlers=handler, options=kept)


def state_of(mesh, step, base):
    """A frozen base, experts of which one is visited in a step, and what changes in each."""
    experts = np.repeat(np.arange(4.0, dtype=np.float32), 512).reshape(4, 512)
    experts[step % 4] += step
    changing = random_array(RNG, (8, 256), np.float32)
    return {
        "base": base,
        "experts": on_mesh(experts, mesh, "a"),
        "adapter": on_mesh(changing, mesh, "a"),
        "step": step,
    }


def files_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("keywords", [{}, {"use_zarr3": True}, {"use_compression": True}], ids=str)
def test_each_step_is_whole_when_the_others_are_gone(tmp_path, mesh, base, keywords):
    run, timelines = tmp_path / "run", []
    states = {step: state_of(mesh, step, base) for step in range(1, 5)}
    with manager_of(run, timelines, **keywords) as manager:
        for step, state in states.items():
            before = files_in(run) if run.exists() else {}
            save(manager, step, state)
            after = files_in(run)
            assert {path: after.get(path) for path in before} == before
    first, *linked_bytes = [t.bytes_linked for t in timelines]
    assert first == 0
    assert min(linked_bytes) >= base.nbytes
    if not keywords.get("use_compression"):  # Else they are so short that they are in the tree.
        # Of four experts two were not visited. Later they may lie where most is dead.
        assert linked_bytes[0] == base.nbytes + 2 * 512 * 4
    for step, state in states.items():
        alone = tmp_path / f"alone_{step}"
        shutil.copytree(run / f"{step}", alone / f"{step}")
        stock_restores(alone, step, state)
        assert lazy_orbax.verify(alone).ok
        found = lazy_orbax.load(alone / f"{step}")
        assert_same(found["base"], np.asarray(base))


def test_retention_and_a_new_process_change_nothing(tmp_path, mesh, base):
    timelines = []
    for first in (1, 4):
        with manager_of(tmp_path, timelines, keep=1) as manager:  # One each, as after a restart.
            for step in range(first, first + 3):
                state = state_of(mesh, step, base)
                save(manager, step, state)
    assert [t.bytes_linked >= base.nbytes for t in timelines] == [False, *5 * [True]]
    assert [path.name for path in tmp_path.iterdir()] == ["6"]
    stock_restores(tmp_path, 6, state)


@pytest.mark.parametrize("n_frozen", [2, 6])
def test_what_is_dead_is_bounded(tmp_path, mesh, n_frozen):
    """Of eight leaves so many are frozen, after a first save in which all were together."""
    leaves = {f"w{i}": RNG.standard_normal(4096, np.float32) for i in range(8)}
    n_bytes, timelines = 8 * 4096 * 4, []
    with manager_of(tmp_path, timelines) as manager:
        for step in range(8):
            leaves |= {f"w{i}": leaves[f"w{i}"] + 1 for i in range(n_frozen, 8)}
            save(manager, step, leaves)
            taken = sum(len(content) for content in files_in(tmp_path / f"{step}").values())
            assert taken < 2.2 * n_bytes
    stock_restores(tmp_path, 7, leaves)
    assert timelines[1].bytes_linked == n_frozen * 4096 * 4
    if n_frozen > 4:  # Else they are written again, now and then.
        assert {t.bytes_linked for t in timelines[1:]} == {n_frozen * 4096 * 4}


def lose_manifest(process):
    (process / "manifest.ocdbt").unlink()


def spoil_manifest(process):
    (process / "manifest.ocdbt").write_bytes(b"no manifest")


def lose_values(process):
    for path in (process / "d").iterdir():
        path.unlink()


def change_values(process):
    for path in (process / "d").iterdir():
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**10))


def cut_off_values(process):
    for path in (process / "d").iterdir():
        found = path.stat()
        if found.st_size > 2**14:
            os.truncate(path, found.st_size // 2)
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def lead_elsewhere(process):
    for path in list((process / "d").iterdir()):
        path.rename(process / path.name)
        path.symlink_to(process / path.name)


@pytest.mark.parametrize(
    "harm",
    [lose_manifest, spoil_manifest, lose_values, change_values, cut_off_values, lead_elsewhere],
)
def test_what_is_wrong_with_the_older_step_is_no_harm(tmp_path, mesh, base, harm):
    timelines, state = [], {"base": base}
    with manager_of(tmp_path, timelines) as manager:
        save(manager, 1, state)
        harm(tmp_path / "1" / "default" / "ocdbt.process_0")
        save(manager, 2, state)
    assert timelines[-1].bytes_linked == 0
    assert all(path.stat().st_nlink == 1 for path in files_in(tmp_path))
    stock_restores(tmp_path, 2, state)
    assert lazy_orbax.verify(tmp_path / "2").ok


def test_what_cannot_be_linked_is_written(tmp_path, mesh, base, monkeypatch):
    timelines, state = [], {"base": base}

    def refuse(source, name, **keywords):
        raise OSError(31, "Too many links")

    with manager_of(tmp_path, timelines) as manager:
        save(manager, 1, state)
        monkeypatch.setattr(os, "link", refuse)
        save(manager, 2, state)
    assert timelines[-1].bytes_linked == 0
    stock_restores(tmp_path, 2, state)


def test_the_older_step_may_be_deleted_while_the_next_one_is_written(
    tmp_path, mesh, base, monkeypatch
):
    timelines, state = [], {"base": base, "more": np.ones(3000)}
    links_to_earlier = writer.links_to_earlier

    def then_deleted(*given):
        found = links_to_earlier(*given)
        link = found.link

        def linked(*given):
            done = link(*given)
            shutil.rmtree(tmp_path / "1", ignore_errors=True)
            return done

        monkeypatch.setattr(found, "link", linked)
        return found

    with manager_of(tmp_path, timelines) as manager:
        save(manager, 1, state)
        monkeypatch.setattr(writer, "links_to_earlier", then_deleted)
        save(manager, 2, state)
    assert timelines[-1].bytes_linked > 0
    assert not (tmp_path / "1").exists()
    stock_restores(tmp_path, 2, state)
    assert lazy_orbax.verify(tmp_path).ok


def test_the_digests_are_younger_than_all_that_may_be_linked(tmp_path, base, monkeypatch):
    """Also what the first process of a pod writes at the end, for leaves that others have."""
    told, fill, finish, wait = [], DigestTemplate.fill, writer.Writer.finish, writer.Writer.wait

    def filled(*given):
        told.append("digests")
        return fill(*given)

    def finished(self, *given):
        told.clear()
        self._stores.clear()
        return finish(self, *given)

    def waited(self, requests, *given):
        told.extend(request.key for request in requests)
        return wait(self, requests, *given)

    monkeypatch.setattr(DigestTemplate, "fill", filled)
    monkeypatch.setattr(writer.Writer, "finish", finished)
    monkeypatch.setattr(writer.Writer, "wait", waited)
    with manager_of(tmp_path) as manager:
        save(manager, 1, {"base": base})
    assert told.index("base/.zarray") < told.index("digests")


def test_references_that_are_not_there_fail_the_save(tmp_path, mesh, base, monkeypatch):
    empty = ts.KvStore.open({"driver": "ocdbt", "base": "memory://"}).result()
    real = item_stores.ItemStores.open_earlier
    monkeypatch.setattr(
        item_stores.ItemStores, "open_earlier", lambda *given: (empty, real(*given)[1])
    )
    with manager_of(tmp_path) as manager:
        save(manager, 1, {"base": base})
        with pytest.raises(SaveError):
            save(manager, 2, {"base": base})
        assert manager.all_steps() == [1]


def test_other_trees_and_formats_are_written(tmp_path, mesh, base):
    timelines = []
    saves = [
        ({"w": base}, {}),
        ({"v": base}, {}),
        ({"v": base}, {"use_zarr3": True}),
        ({"v": base}, {"use_ocdbt": False}),
        ({"v": base}, {}),
        ({"v": base, "more": np.ones(3)}, {}),
    ]
    for step, (state, keywords) in enumerate(saves):
        with manager_of(tmp_path, timelines, **keywords) as manager:
            save(manager, step, state)
        stock_restores(tmp_path, step, state)
    assert [t.bytes_linked for t in timelines] == [0, 0, 0, 0, 0, base.nbytes]


@pytest.mark.parametrize("arrays", [{}, {"few": 1.5}, {"base": np.arange(5000.0)}], ids=list)
def test_a_step_without_arrays_is_saved_after_one_with_any(tmp_path, arrays):
    """Where there is no array, there is no database to link to or from."""
    states = [arrays | {"text": "a"}, {"text": "b"}, {"text": "b"}, arrays | {"text": "c"}]
    with manager_of(tmp_path) as manager:
        for step, state in enumerate(states):
            save(manager, step, state)
    for step, state in enumerate(states):
        with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as stock:
            assert_same(stock.restore(step), state)


def test_a_flipped_bit_is_seen_in_every_step_that_shares_it(tmp_path, mesh, base):
    state = {"base": base}
    with manager_of(tmp_path, use_compression=False) as manager:
        save(manager, 1, state)
        save(manager, 2, state)
        chunk = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
        with chunk.open("r+b") as file:
            file.write(bytes([chunk.read_bytes()[0] ^ 1]))
        args = ocp.args.PyTreeRestore(state, ocp.checkpoint_utils.construct_restore_args(state))
        for step in (1, 2):
            with pytest.raises(CorruptCheckpointError, match="base"):
                manager.restore(step, args=args)
