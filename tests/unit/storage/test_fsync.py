"""What is synced, when, and how often."""

import asyncio
import errno
import os
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import on_mesh
from etils import epath

import lazy_orbax
from lazy_orbax._orbax import multihost
from lazy_orbax.storage import fsync

WAIT_S = 30


class Synced:
    """Notes what is synced, by its path."""

    def __init__(self):
        self.paths, self.failing, self.began = [], {}, threading.Semaphore(0)

    def fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.paths.append(path)
        self.began.release()
        if path in self.failing:
            raise self.failing[path]


@pytest.fixture
def synced(monkeypatch):
    noted = Synced()
    monkeypatch.setattr(fsync.os, "fsync", noted.fsync)
    return noted


@pytest.fixture
def syncer(tmp_path):
    syncer = fsync.Syncer(str(tmp_path), (), timeout_s=WAIT_S)
    yield syncer
    syncer.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lazy_orbax-sync")]


def test_everything_is_synced_files_before_their_directories(tmp_path, synced, syncer):
    (tmp_path / "d").mkdir()
    files = [tmp_path / "a", tmp_path / "d" / "b"]
    for file in files:
        file.write_text("x")
    syncer.finish()
    assert set(synced.paths[:2]) == set(map(str, files))
    assert sorted(synced.paths[2:]) == [str(tmp_path), str(tmp_path / "d")]


def test_what_was_synced_while_writing_is_not_synced_again(tmp_path, synced, syncer):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("x")
    syncer.begin()
    assert synced.began.acquire(timeout=WAIT_S)
    second.write_text("x")
    syncer.finish()
    assert sorted(synced.paths) == [str(tmp_path), str(first), str(second)]


@pytest.mark.parametrize("how", ["grew", "was replaced"])
def test_a_file_that_changed_since_is_synced_again(tmp_path, synced, syncer, how):
    file = tmp_path / "file"
    file.write_text("x")
    syncer.begin()
    assert synced.began.acquire(timeout=WAIT_S)
    if how == "grew":
        file.write_text("xx")
    else:
        (tmp_path / "new").write_text("y")
        (tmp_path / "new").rename(file)
    syncer.finish()
    assert synced.paths.count(str(file)) == 2


def test_a_storage_that_refuses_while_writing_is_told_at_the_end(tmp_path, synced, syncer):
    file = tmp_path / "file"
    file.write_text("x")
    synced.failing[str(file)] = OSError(errno.EIO, "no more", str(file))
    syncer.begin()
    assert synced.began.acquire(timeout=WAIT_S)
    with pytest.raises(OSError, match="no more"):
        syncer.finish()


def test_a_directory_that_cannot_be_synced_is_no_error(tmp_path, synced, syncer):
    synced.failing[str(tmp_path)] = OSError(errno.EINVAL, "a directory")
    syncer.finish()
    assert synced.paths == [str(tmp_path)]


def test_a_temporary_file_that_is_gone_is_no_error(tmp_path, synced, syncer, monkeypatch):
    (tmp_path / "gone").write_text("x")
    opened = os.open

    def vanish(path, *args):
        if path.endswith("gone"):
            os.unlink(path)
        return opened(path, *args)

    monkeypatch.setattr(fsync.os, "open", vanish)
    syncer.finish()
    assert synced.paths == [str(tmp_path)]


def test_a_directory_of_very_many_files_is_looked_through_once(tmp_path, synced, syncer):
    for i in range(fsync._MOST_WATCHED + 1):
        (tmp_path / f"{i}").touch()
    syncer.begin()
    assert synced.began.acquire(timeout=WAIT_S)
    syncer._collect()
    (tmp_path / "late").touch()
    syncer.begin()
    syncer._collect()
    assert str(tmp_path / "late") not in synced.paths
    syncer.finish()
    assert synced.paths.count(str(tmp_path / "late")) == 1


def test_each_process_syncs_its_own(tmp_path, synced):
    names = ("1", "replica_1", "11", "2")
    files = [tmp_path / f"ocdbt.process_{name}" / "d" / "x" for name in names]
    files += [tmp_path / "array_metadatas" / "process_2", tmp_path / "leaf" / "0.0"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("x")
    syncer = fsync.Syncer(
        str(tmp_path), {"ocdbt.process_1", "ocdbt.process_replica_1"}, timeout_s=WAIT_S
    )
    syncer.finish()
    syncer.close()
    mine = [*files[:2], *files[4:]]
    directories = [parent for file in mine for parent in file.parents]
    wanted = {str(path) for path in (*mine, *directories) if path.is_relative_to(tmp_path)}
    assert set(synced.paths) == wanted


@pytest.mark.parametrize("separate", [True, False])
def test_what_a_save_wrote_is_all_synced(tmp_path, mesh, synced, separate):
    tree = {
        "split": on_mesh(np.ones((8, 4), np.float32), mesh, "a", "b"),
        "replicated": on_mesh(np.ones((8, 4), np.float32), mesh),
    }
    arrays = ocp.type_handlers.ArrayHandler(
        enable_replica_parallel_separate_folder=separate,
        array_metadata_store=multihost.array_metadata_store(),
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    directory = tmp_path / "item"
    directory.mkdir()
    handler = lazy_orbax.LazyCheckpointHandler(type_handler_registry=registry)
    futures = asyncio.run(
        handler.async_save(epath.Path(directory), args=lazy_orbax.args.LazySave(tree))
    )
    for future in futures:
        future.result()
    found = {str(path) for path in directory.rglob("*")}
    assert any("replica_" in path for path in found) == separate
    # TensorStore's temporary files may be seen, and synced, while they are written.
    renamed = {path for path in synced.paths if path.endswith(".__lock")}
    assert found | {str(directory)} == set(synced.paths) - renamed
    handler.close()
