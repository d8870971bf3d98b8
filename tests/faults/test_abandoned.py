"""A save that is given up while its directory appears: two threads let go of what it holds."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest
from equipment.gates import HANG_S, Boom
from equipment.trees import on_mesh

import lazy_orbax
from lazy_orbax._orbax.records import Destination
from lazy_orbax.errors import SaveError
from lazy_orbax.save.job import Job
from lazy_orbax.save.pipeline import Save
from lazy_orbax.save.plan_cache import prepare
from lazy_orbax.save.unchanged_state import Fingerprints
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage.pace import Pace
from lazy_orbax.timeline import Recorder


class HeldQueue:
    """A queue that holds its first reader, after it looked, until the gate is opened."""

    def __init__(self, inner):
        self._inner, self._first = inner, threading.Lock()
        self.reached, self.opened = threading.Event(), threading.Event()
        self.put = inner.put

    def _hold(self):
        if self._first.acquire(blocking=False):
            self.reached.set()
            assert self.opened.wait(HANG_S)

    def empty(self):
        found = self._inner.empty()
        self._hold()
        return found

    def get(self):
        return self._inner.get()

    def get_nowait(self):
        self._hold()
        return self._inner.get_nowait()


def test_two_threads_that_drop_one_save_both_end(tmp_path, mesh):
    """One gave the save up before it was written, the other is Orbax's, with the directory."""
    options = lazy_orbax.LazyOptions()
    handler = lazy_orbax.LazyCheckpointHandler(options=options)
    tree = {"w": on_mesh(np.ones((8, 8), np.float32), mesh, "a")}
    destination = Destination(str(tmp_path), None)
    prepared, leaves = prepare(
        handler.settings, tree, None, destination=destination, slab_bytes=2**20, abstract=False
    )
    job = Job(
        prepared=prepared,
        texts={},
        options=options,
        limit_bytes=2**30,
        pace=Pace(None),
        fingerprints=Fingerprints(),
        recorder=Recorder(str(tmp_path), None),
        evidence=None,
    )
    save = Save(job)
    save.snapshot(prepared.arrays(leaves))
    save.wait_until_staged(HANG_S)
    held = save._holding.on_host = HeldQueue(save._holding.on_host)
    save.fail(Boom("given up"))
    abandoning = threading.Thread(target=save.drop, daemon=True)
    abandoning.start()
    assert held.reached.wait(HANG_S)
    raised = queue.SimpleQueue()

    def write():
        try:
            save.write(str(tmp_path), None)
        except SaveError as error:
            raised.put(error)

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(1)  # It ends here where it drops what is held; else it waits for the other.
    held.opened.set()
    hung = [thread for thread in (abandoning, writing) if thread.join(HANG_S) or thread.is_alive()]
    for _ in hung:
        held.put(None)
    assert not hung
    with pytest.raises(queue.Empty):
        held.get_nowait()
    assert isinstance(raised.get(timeout=HANG_S), SaveError)
    assert HOST_BUDGET.in_flight_bytes == 0
    handler.close()
