"""What a save holds in memory, from when it was snapshotted until it is written or dropped."""

from __future__ import annotations

import contextlib
import queue
import weakref
from typing import Any

from lazy_orbax.save.beside import Beside
from lazy_orbax.snapshot.device_to_host import Held
from lazy_orbax.snapshot.host_budget import Lease


class Holding:
    """The slabs and leases of one save; its three threads hand them on here.

    Attributes:
        on_device: slabs that our thread has to bring to the host; `None` comes last.
        on_host: slabs to be written, with their leases; `None` comes last.
        arriving: arrays that are on their way to the host by themselves.
        leases: every lease of host memory of this save.
        beside: what takes the pieces beside storage, if anything does.
    """

    def __init__(self) -> None:
        self.on_device: queue.SimpleQueue[Held | None] = queue.SimpleQueue()
        self.on_host: queue.SimpleQueue[tuple[Held, Lease] | None] = queue.SimpleQueue()
        self.arriving: list[weakref.ref[Any]] = []
        self.leases: list[Lease] = []
        self.beside: Beside | None = None

    def drop(self, why: BaseException | None) -> None:
        """Returns every byte. Nobody may add any more.

        Args:
            why: what ended the save, if it failed.
        """
        for waiting in (self.on_device, self.on_host):
            with contextlib.suppress(queue.Empty):  # Another thread may be dropping as well.
                while True:
                    waiting.get_nowait()
        # After the queues: a slab in them is memory that its lease counts.
        for lease in self.leases:
            lease.release()
        if self.beside is not None:
            self.beside.end(why)
