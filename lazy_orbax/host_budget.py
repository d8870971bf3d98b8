"""Byte accounting with backpressure: bytes are reserved before D2H and returned when written.

One budget serves every save, item and handler of the process. The idea of reserving host bytes
before the copy and returning them when the write is done is torchsnapshot's.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from lazy_orbax.errors import LazyOrbaxError


class ReservationAborted(LazyOrbaxError):
    """The save that waited for host memory was cancelled or has failed."""


class Lease:
    """Bytes of host memory that are reserved until `release` is called."""

    def __init__(self, budget: HostBudget, n_bytes: int):
        self._budget, self._n_bytes = budget, n_bytes

    def release(self) -> None:
        """Returns the bytes. A second call does nothing."""
        with self._budget._changed:
            self._budget._in_flight_bytes -= self._n_bytes
            self._n_bytes = 0
            self._budget._changed.notify_all()


class HostBudget:
    """Counts the bytes of snapshots in host memory.

    Invariant, under the lock: `in_flight_bytes` is the sum of what was reserved and not yet
    released. Requests are admitted in the order they came. One is admitted when it fits its own
    limit beside what is in flight, or when nothing is in flight: so a piece larger than the limit
    goes through alone instead of failing or waiting for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_flight_bytes = 0
        self._peak_bytes = 0
        self._queue: collections.deque[object] = collections.deque()

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved and not yet released."""
        return self._in_flight_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever in flight at once."""
        return self._peak_bytes

    def reserve(self, n_bytes: int, *, limit_bytes: int, aborted: Callable[[], bool]) -> Lease:
        """Waits until `n_bytes` may be held in host memory, and counts them.

        Args:
            n_bytes: bytes to reserve.
            limit_bytes: most bytes in flight at which the request is admitted.
            aborted: asked whenever the budget changes or `wake()` is called.

        Returns:
            The lease, to be released when the bytes are written or dropped.

        Raises:
            ReservationAborted: `aborted()` became true first. Nothing is reserved then.
        """
        ticket = object()

        def admitted() -> bool:
            fits = self._in_flight_bytes + n_bytes <= limit_bytes or self._in_flight_bytes == 0
            return self._queue[0] is ticket and fits

        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: aborted() or admitted())
                if aborted():
                    raise ReservationAborted("Cancelled while waiting for host memory.")
                self._in_flight_bytes += n_bytes
                self._peak_bytes = max(self._peak_bytes, self._in_flight_bytes)
                return Lease(self, n_bytes)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def wake(self) -> None:
        """Makes every waiting `reserve` ask its `aborted` again."""
        with self._changed:
            self._changed.notify_all()


HOST_BUDGET = HostBudget()
"""The budget of this process."""
