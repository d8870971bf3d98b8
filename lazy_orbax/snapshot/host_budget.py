"""Byte accounting with backpressure: bytes are reserved before D2H and returned when written.

One budget serves every save, item and handler of the process. The idea of reserving host bytes
before the copy and returning them when the write is done is torchsnapshot's. Buffers that were
written are kept for the next save, in the same account: memory that was touched once is far
cheaper than new memory, and a process that saves for ever does not grow.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from lazy_orbax.errors import LazyOrbaxError


class ReservationAborted(LazyOrbaxError):
    """The save that waited for host memory was cancelled or has failed."""


class Lease:
    """Bytes of host memory that are reserved until `release` is called.

    Attributes:
        buffer: what the last lease of the same kind left behind, or `None`.
    """

    def __init__(self, budget: HostBudget, n_bytes: int, kind: Hashable, buffer: Any | None):
        self.buffer = buffer
        self._budget, self._n_bytes, self._kind = budget, n_bytes, kind
        self._readers: list[Any] = []
        self._is_stuck = False

    def hold(self, readers: Iterable[Any]) -> None:
        """Keeps the bytes counted, even when released, until whoever reads them is done.

        Args:
            readers: futures of TensorStore.
        """
        with self._budget._changed:
            self._readers += readers
            reading = list(self._readers)
        for reader in reading:
            reader.add_done_callback(lambda _: self._let_go())

    def _let_go(self) -> None:
        with self._budget._changed:
            if self._is_stuck:
                self.release()

    def release(self, buffer: Any | None = None) -> None:
        """Returns the bytes. A second call does nothing.

        Args:
            buffer: memory of `n_bytes` that the next lease of this kind may use again.
        """
        with self._budget._changed:
            was_stuck, self._is_stuck = self._is_stuck, False
            self._budget._stuck_bytes -= self._n_bytes * was_stuck
            # Somebody reads the memory yet, so it stays counted; the last reader releases it again.
            if not all(reader.done() for reader in self._readers):
                self._is_stuck = True
                self._budget._stuck_bytes += self._n_bytes
                self._budget._changed.notify_all()
                return
            self._readers.clear()
            # The lease ends here. With no bytes left, a second release changes nothing.
            n_bytes, self._n_bytes, self.buffer = self._n_bytes, 0, None
            self._budget._in_flight_bytes -= n_bytes
            if buffer is not None and n_bytes:
                # It is not counted in flight any more, and gives way to whatever is.
                self._budget._idle.append((self._kind, n_bytes, buffer))
            self._budget._changed.notify_all()


class HostBudget:
    """Counts the bytes of snapshots in host memory.

    Invariant, under the lock: `in_flight_bytes` is the sum of what was reserved and not yet
    released; `_idle` has the buffers that wait to be used again, last used last, and gives way to
    what is in flight. Requests are admitted in the order they came. One is admitted when it fits
    its own limit beside what is in flight, or when nothing is in flight: so a piece larger than
    the limit goes through alone instead of failing or waiting for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_flight_bytes = 0
        self._stuck_bytes = 0  # Released, and read yet.
        self._peak_bytes = 0
        self._queue: collections.deque[object] = collections.deque()
        self._idle: list[tuple[Hashable, int, Any]] = []

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved and not yet released."""
        return self._in_flight_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever in flight at once."""
        return self._peak_bytes

    @property
    def idle_bytes(self) -> int:
        """Bytes of buffers that were written and wait to be used again."""
        with self._changed:
            return sum(n_bytes for _, n_bytes, _ in self._idle)

    def reserve(
        self,
        n_bytes: int,
        *,
        limit_bytes: int,
        aborted: Callable[[], bool],
        kind: Hashable = None,
    ) -> Lease:
        """Waits until `n_bytes` may be held in host memory, and counts them.

        Args:
            n_bytes: bytes to reserve.
            limit_bytes: most bytes in flight at which the request is admitted.
            aborted: asked whenever the budget changes or `wake()` is called.
            kind: which idle buffers would do; `None` if none would.

        Returns:
            The lease, to be released when the bytes are written or dropped.

        Raises:
            ReservationAborted: `aborted()` became true first, or storage that hangs has what
                would be needed. Nothing is reserved then.
        """
        ticket = object()

        def admitted() -> bool:
            fits = self._in_flight_bytes + n_bytes <= limit_bytes or self._in_flight_bytes == 0
            return self._queue[0] is ticket and fits

        def hopeless() -> bool:
            return self._stuck_bytes > 0 and self._stuck_bytes + n_bytes > limit_bytes

        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: aborted() or hopeless() or admitted())
                if hopeless() and not aborted():
                    raise ReservationAborted(
                        f"{self._stuck_bytes} bytes of host memory are held by writes that the "
                        "storage has not acknowledged, of saves that were given up"
                    )
                if aborted():
                    raise ReservationAborted("Cancelled while waiting for host memory.")
                self._in_flight_bytes += n_bytes
                self._peak_bytes = max(self._peak_bytes, self._in_flight_bytes)
                buffer = self._reused(kind)
                self._make_room(limit_bytes)
                return Lease(self, n_bytes, kind, buffer)
            finally:
                # Admitted or not: the next in the queue may be admitted now.
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _reused(self, kind: Hashable) -> Any | None:
        for i in reversed(range(len(self._idle))):
            if kind is not None and self._idle[i][0] == kind:
                return self._idle.pop(i)[2]
        return None

    def _make_room(self, limit_bytes: int) -> None:
        """Drops idle buffers, longest unused first, until all fits the limit."""
        idle_bytes = sum(n_bytes for _, n_bytes, _ in self._idle)
        while self._idle and self._in_flight_bytes + idle_bytes > limit_bytes:
            idle_bytes -= self._idle.pop(0)[1]

    def drop_idle(self) -> None:
        """Gives back the memory of every buffer that waits to be used again."""
        with self._changed:
            self._idle.clear()

    def count(self, n_bytes: int, *, limit_bytes: int) -> Lease:
        """Counts bytes that are in host memory already, whatever the limit: waiting frees none.

        Args:
            n_bytes: bytes to count.
            limit_bytes: idle buffers are dropped until all fits it, or none is left.

        Returns:
            The lease, to be released when the bytes are written or dropped.
        """
        with self._changed:
            self._in_flight_bytes += n_bytes
            self._peak_bytes = max(self._peak_bytes, self._in_flight_bytes)
            self._make_room(limit_bytes)
        return Lease(self, n_bytes, None, None)

    def wake(self) -> None:
        """Makes every waiting `reserve` ask its `aborted` again."""
        with self._changed:
            self._changed.notify_all()


HOST_BUDGET = HostBudget()
"""The budget of this process."""
