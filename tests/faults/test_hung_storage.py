"""Storage that hangs: the save fails in time, and nothing of this process hangs with it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.gates import held_at, within
from equipment.training import make_state
from faults import disks

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage import fsync

TIMEOUT_S = 1.0
_TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def manager_of(path):
    options = lazy_orbax.LazyOptions(storage_timeout_s=TIMEOUT_S)
    return ocp.CheckpointManager(path, item_handlers=lazy_orbax.standard_handler(options=options))


def test_a_sync_that_hangs_fails_the_save_and_names_the_file(tmp_path, mesh):
    state = make_state(mesh)
    with manager_of(tmp_path) as manager:
        with held_at("sync") as gate:
            with pytest.raises(SaveError, match="nothing was synced for 1 s") as caught:
                within(manager.save, 1, args=ocp.args.StandardSave(state))
                within(manager.wait_until_finished)
            assert caught.value.step == 1
            assert caught.value.file.startswith(str(tmp_path))
            assert HOST_BUDGET.in_flight_bytes == 0
            assert manager.all_steps() == []
            gate.opened.set()
        within(manager.save, 2, args=ocp.args.StandardSave(state))
        within(manager.wait_until_finished)
        assert manager.all_steps() == [2]
        assert disks.temporary(tmp_path) == []


def test_a_slow_disk_is_not_a_disk_that_hangs(tmp_path, monkeypatch):
    """Each sync takes a third of the deadline, and all together many times as long."""
    slow, synced = threading.Lock(), fsync._sync

    def slowly(path):
        with slow:
            threading.Event().wait(TIMEOUT_S / 3)
            synced(path)

    monkeypatch.setattr(fsync, "_sync", slowly)
    with manager_of(tmp_path) as manager:
        within(manager.save, 1, args=ocp.args.StandardSave({"w": np.ones(8)}), timeout_s=60)
        within(manager.wait_until_finished, timeout_s=60)
        assert manager.all_steps() == [1]


def test_storage_that_hangs_fails_and_refuses(tmp_path):
    """In a process of its own, whose calls of the C library can be made to hang and to fail."""
    compiler = disks.have_compiler()
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler to make calls of the C library hang with")
    library = tmp_path / "hanging.so"
    source = os.path.join(_TESTS, "faults", "hanging.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl", "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    path = os.pathsep.join([_TESTS, os.path.dirname(_TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, os.path.join(_TESTS, "faults", "hung.py"), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "ALL HELD" in done.stdout


@pytest.fixture
def memory():
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield str(above / "k")
    shutil.rmtree(above)


def test_a_promotion_to_storage_that_hangs_holds_up_no_save_to_memory(tmp_path, memory):
    tier = lazy_orbax.Tier(tmp_path / "tier", every_s=60)
    with lazy_orbax.Keeper("/run", directory=memory) as keeper:

        def keep(step):
            assert keeper.save(step, {"a": np.full(8, step)})
            within(keeper.wait)

        keep(0)
        with held_at("sync") as gate:
            promoting = threading.Thread(target=promote, args=("/run", tier, memory))
            promoting.start()
            gate.await_call()
            for step in range(1, 6):
                keep(step)
            assert (keeper.report.kept, keeper.report.skipped, keeper.report.failed) == (6, 0, 0)
            assert not [name for name in os.listdir(tier.path) if name.isdecimal()]
        promoting.join()
    assert lazy_orbax.load(f"{tier.path}/0/default")["a"].tolist() == [0] * 8
