"""How fast a handler may write, and a node may send."""

from __future__ import annotations

import threading
import time

from lazy_orbax._machine import is_urgent

# How soon a save that waits for its turn sees that it need not.
_LOOK_S = 0.1


class Pace:
    """A limit to the speed of what several threads let through.

    Invariant, under the lock: `_free_at_s` is when what was let through so far has had its time.
    """

    def __init__(
        self, bytes_per_s: int | None, *, late_s: float = 0.0, is_paid_before: bool = False
    ):
        """Sets the limit.

        Args:
            bytes_per_s: the limit; `None` lets everything through at once.
            late_s: seconds of what was not let through since `begin` that are made up for, so that
                delays do not add up.
            is_paid_before: whether bytes are let through when their time is over, so that never
                more went through than the limit allows; else when that of those before them is.
        """
        self._bytes_per_s, self._late_s = bytes_per_s, late_s
        self._is_paid_before = is_paid_before
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def begin(self) -> None:
        """Makes nothing up for that was not let through until now."""
        with self._lock:
            self._free_at_s = max(time.monotonic(), self._free_at_s)

    def await_turn(self, n_bytes: int, ended: threading.Event) -> None:
        """Waits until `n_bytes` may go, or until `ended` is set, or in a hurry not."""
        if self._bytes_per_s is None or is_urgent():
            return
        with self._lock:
            turn_s = max(time.monotonic() - self._late_s, self._free_at_s)
            self._free_at_s = turn_s + n_bytes / self._bytes_per_s
            if self._is_paid_before:
                turn_s = self._free_at_s
        while not is_urgent() and (left_s := turn_s - time.monotonic()) > 0:
            if ended.wait(min(left_s, _LOOK_S)):
                break
