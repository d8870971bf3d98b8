"""Host to storage, slab by slab, and no faster than allowed."""

from __future__ import annotations

import collections
import queue
import threading
import weakref

from lazy_orbax.plan.slabs import Plan
from lazy_orbax.save.beside import PiecesBeside
from lazy_orbax.save.writer import Request, Writer
from lazy_orbax.snapshot import device_to_host
from lazy_orbax.snapshot.device_to_host import Held
from lazy_orbax.snapshot.host_budget import Lease
from lazy_orbax.storage.pace import Pace

# Slabs that may be with TensorStore at once: one being written while the next is handed over.
_MOST_WRITING = 2
# TensorStore's threads let go of what they have written a moment after they say so.
_LETTING_GO_S = 1.0


def drain(
    arriving: queue.SimpleQueue[tuple[Held, Lease] | None],
    writer: Writer | PiecesBeside,
    plan: Plan,
    *,
    pace: Pace,
    ended: threading.Event,
) -> None:
    """Writes slabs as they arrive, and returns their host memory as they are written.

    Args:
        arriving: the slabs with their leases; `None` comes last.
        writer: where to.
        plan: the plan that the slabs are from.
        pace: how fast.
        ended: set when the save is over, in which case nothing more needs to be written.

    Raises:
        SaveError: the storage refused something.
    """
    writing: collections.deque[tuple[list[Request], Held, Lease]] = collections.deque()

    def settle_oldest() -> None:
        futures, held, lease = writing[0]
        writer.wait(futures, held.slab)
        writing.popleft()
        buffer = held.buffer
        deaths = [] if buffer is None else _deaths_of(held)
        del futures, held  # The host copy dies here, and only then is its lease returned.
        is_read = not all(died.wait(_LETTING_GO_S) for died in deaths)
        lease.release(None if is_read else buffer)

    try:
        while True:
            while writing and (len(writing) == _MOST_WRITING or arriving.empty()):
                settle_oldest()
            item = arriving.get()
            if item is None:
                break
            pace.await_turn(item[0].slab.n_bytes, ended)
            # The lease goes on with the slab; `settle_oldest` returns it when that is written.
            held, lease = device_to_host.to_host(item[0]), item[1]
            writing.append((writer.write(device_to_host.views(plan, held)), held, lease))
            del item, held
        # Everything was handed over. The loop ends early where the save has failed meanwhile.
        while writing and not ended.is_set():
            settle_oldest()
    finally:
        for futures, _, lease in writing:
            if not writer.gives_up:  # What hangs may do so for ever, and TensorStore reads it.
                lease.hold(future for future, _ in futures if not future.done())
        # The slabs die here. `Holding.drop` releases their leases, or whoever reads them last.
        writing.clear()


def _deaths_of(held: Held) -> list[threading.Event]:
    """Returns events that are set as the views of a slab's buffer die."""
    deaths = []
    for array in (array for shards in held.arrays for array in shards.values()):
        if not array.flags.owndata:  # XLA hands out copies of what has less than a byte.
            died = threading.Event()
            weakref.finalize(array, died.set).atexit = False
            deaths.append(died)
    return deaths
