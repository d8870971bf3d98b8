"""A step is read back before it is listed: what is not what was written is never seen."""

import asyncio
import errno
import json
import os

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import lazy_orbax
from lazy_orbax._paths import PROMOTED
from lazy_orbax.errors import CorruptCheckpointError
from lazy_orbax.handlers import verified_path
from lazy_orbax.handlers.verified_path import verified_in
from lazy_orbax.storage.places import LocalPlace

STATE = {"a": np.arange(2000.0), "b": np.ones(3, np.int8)}


def save(run, handler):
    options = ocp.CheckpointManagerOptions(temporary_path_class=verified_in(str(run), {"run": "x"}))
    with ocp.CheckpointManager(run, item_handlers=handler, options=options) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(STATE))
        manager.wait_until_finished()


def test_what_is_whole_is_listed_and_bears_the_mark(tmp_path):
    save(tmp_path, lazy_orbax.pytree_handler())
    assert json.loads((tmp_path / "1" / PROMOTED).read_text()) == {"run": "x"}
    with ocp.CheckpointManager(tmp_path) as stock:
        assert np.array_equal(stock.restore(1)["a"], STATE["a"])
    assert lazy_orbax.verify(tmp_path).is_whole


def test_a_flipped_bit_on_the_way_to_storage_is_never_listed(tmp_path, monkeypatch):
    look = verified_path.problems_before_publication

    def flip(directory):
        files = [os.path.join(at, name) for at, _, names in os.walk(directory) for name in names]
        largest = max(files, key=os.path.getsize)
        with open(largest, "r+b") as file:
            file.seek(os.path.getsize(largest) // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        return look(directory)

    monkeypatch.setattr(verified_path, "problems_before_publication", flip)
    with pytest.raises(CorruptCheckpointError, match="leaf a"):
        save(tmp_path, lazy_orbax.pytree_handler(use_compression=False))
    with ocp.CheckpointManager(tmp_path) as stock:
        assert stock.all_steps() == []


def test_what_has_no_digests_is_not_listed(tmp_path):
    with pytest.raises(CorruptCheckpointError, match="not compared"):
        save(tmp_path, ocp.PyTreeCheckpointHandler())
    assert not (tmp_path / "1").exists()


def test_a_run_may_be_written_with_two_slashes(tmp_path):
    """As `gs://bucket//run`: Orbax knows it with one."""
    options = ocp.CheckpointManagerOptions(
        temporary_path_class=verified_in(f"{tmp_path.parent}//{tmp_path.name}", {"run": "x"})
    )
    with (
        ocp.CheckpointManager(tmp_path, options=options) as manager,
        pytest.raises(CorruptCheckpointError, match="not compared"),
    ):
        manager.save(1, args=ocp.args.PyTreeSave(STATE))
        manager.wait_until_finished()


def test_what_cannot_be_marked_is_not_left(tmp_path, monkeypatch):
    """Such as on a full disk: nobody would know whose it is."""

    def write(place, name, content):
        raise OSError(errno.ENOSPC, "no space is left")

    monkeypatch.setattr(LocalPlace, "write", write)
    kind = verified_in(str(tmp_path), {"run": "x"})
    with pytest.raises(OSError, match="no space"):
        asyncio.run(kind.from_final(epath.Path(tmp_path / "1")).create())
    assert os.listdir(tmp_path) == []
