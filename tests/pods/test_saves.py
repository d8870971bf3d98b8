"""Twenty saves of 2 and 4 processes, and restoring them on other processes, meshes and specs."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.pods import states
from equipment.pods.jobs import reports, run_job

import lazy_orbax


@pytest.fixture(scope="module", params=[2, 4])
def job(request, tmp_path_factory):
    """Twenty saves. Returns how many processes made them, where, and what they reported."""
    root = tmp_path_factory.mktemp("saves")
    ended = run_job(request.param, "twenty_saves", root / "run", logs=root)
    return request.param, root / "run", reports(ended)


def mesh_of(*shape):
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))


def state_after_step(step):
    """Two more training steps follow each save, before the next."""
    return states.values(3 * step - 2)


def restore(root, step, mesh, specs=states.SPECS):
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        target = states.targets(mesh, specs)
        return stock.restore(step, args=ocp.args.StandardRestore(target))


def test_each_of_twenty_saves_restores_in_stock_orbax_in_one_process(job):
    _, root, processes = job
    assert all(process["steps"] == list(range(1, 21)) for process in processes)
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as stock:
        assert stock.all_steps() == list(range(1, 21))
    for step in range(1, 21):
        found = restore(root, step, mesh_of(4, 2))
        assert states.differences(found, state_after_step(step)) == [], step


def test_each_byte_is_written_once_and_evenly(job):
    n, root, processes = job
    for step, written in enumerate(zip(*(p["bytes"] for p in processes), strict=True), start=1):
        assert sum(written) == states.N_BYTES, step
        assert max(written) < 1.25 * states.N_BYTES / n, written
        on_disk = sum(file.stat().st_size for file in (root / str(step)).rglob("d/*"))
        assert on_disk < 1.02 * states.N_BYTES


def test_donation_still_aliases_and_no_host_memory_is_kept(job):
    _, _, processes = job
    for process in processes:
        # The first step is given buffers that were made from host memory.
        assert set(process["moved"]) <= {1}
        assert process["in_flight"] == 0


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1)])
@pytest.mark.parametrize("specs", [states.SPECS, states.OTHER_SPECS], ids=["same", "other"])
def test_one_process_resumes_on_another_mesh(job, shape, specs, caplog):
    _, root, _ = job
    found = restore(root, 20, mesh_of(*shape), specs)
    assert states.differences(found, state_after_step(20)) == []
    assert "harding" not in caplog.text


def test_resuming_on_other_processes_and_back(tmp_path):
    """1 process with 8 devices, to 4 with 2, to 2 with 4, and back to 1."""
    wanted = states.values(5)
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    with ocp.CheckpointManager(first, item_handlers=lazy_orbax.standard_handler()) as manager:
        manager.save(1, args=ocp.args.StandardSave(states.on_mesh(mesh_of(2, 4), 5)))
    for n, shape, source, target in ((4, (2, 4), first, second), (2, (8, 1), second, third)):
        ended = run_job(
            n,
            "restored",
            source,
            logs=tmp_path / f"logs_{n}",
            n_devices=8 // n,
            step=1,
            n_steps=5,
            shape=shape,
            again=target,
        )
        assert [report["wrong"] for report in reports(ended)] == [[]] * n
        assert not any("harding info" in process.log for process in ended)
    assert states.differences(restore(third, 1, mesh_of(4, 2)), wanted) == []


@pytest.mark.parametrize("in_database", [pytest.param(False, marks=pytest.mark.slow), True])
def test_each_process_links_what_it_wrote_and_did_not_change(tmp_path, in_database):
    root, logs = tmp_path / "run", tmp_path / "logs"
    processes = reports(run_job(2, "linked_saves", root, logs=logs, in_database=in_database))
    assert all(process["steps"] == [1, 2] for process in processes)
    values, changed = states.values(1), states.values(2)
    kept = (value.nbytes for name, value in values.items() if name not in ("both", "prime"))
    # What is short is in the tree of a database, and is written.
    same = sum(n_bytes for n_bytes in kept if not in_database or n_bytes > 2**12)
    assert [sum(n) for n in zip(*(p["linked"] for p in processes), strict=True)] == [0, same]
    assert all(process["linked"][1] > 0 for process in processes)
    shutil.rmtree(root / "1")
    wanted = {**values, "both": changed["both"], "prime": changed["prime"]}
    assert states.differences(restore(root, 2, mesh_of(4, 2)), wanted) == []
    assert lazy_orbax.verify(root).ok
