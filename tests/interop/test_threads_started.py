"""How many threads a save starts."""

import threading

import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import on_mesh

import lazy_orbax
from lazy_orbax.storage import fsync, threads

# One brings slabs to the host, one is Orbax's and writes, one publishes. How many sync, merge and
# so on depends on the disk, and on nothing else: on a fast one two or three, never more than this.
MOST = 3 + fsync._THREADS


@pytest.mark.parametrize("options", [{}, {"temporary_path_class": lazy_orbax.DurablePath}])
def test_a_save_of_small_leaves_starts_few_threads(tmp_path, mesh, monkeypatch, options, tell):
    tree = {str(i): on_mesh(np.full((8, 8), i, np.float32), mesh, "a") for i in range(20)}
    started, start = [], threading.Thread.start

    def note(thread):
        started.append(thread.name)
        start(thread)

    # However slow the disk is, no thread gives up in the middle of a save.
    monkeypatch.setattr(threads, "_IDLE_S", 300)
    options = ocp.CheckpointManagerOptions(**options)
    handler = lazy_orbax.standard_handler()
    with ocp.CheckpointManager(tmp_path, item_handlers=handler, options=options) as manager:
        for step in range(4):
            threads.dismiss_idle()
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
            if step == 0:  # The first also plans.
                monkeypatch.setattr(threading.Thread, "start", note)
                continue
            ours = [name for name in started if name.startswith("lazy_orbax")]
            tell("threads", f"save {step}", f"{len(ours)} of {len(started)} that were started")
            assert len(ours) <= MOST, ours
            started.clear()
