"""How fast a handler may write."""

from __future__ import annotations

import threading
import time

from lazy_orbax._machine import is_urgent

# How soon a save that waits for its turn sees that it need not.
_LOOK_S = 0.1


class Pace:
    """A limit to the speed of writing, shared by all that one handler saves.

    Invariant, under the lock: `_free_at_s` is when what was let through so far has had its time.
    """

    def __init__(self, bytes_per_s: int | None):
        """Sets the limit.

        Args:
            bytes_per_s: the limit; `None` lets everything through at once.
        """
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def await_turn(self, n_bytes: int, ended: threading.Event) -> None:
        """Waits until `n_bytes` may be written, or until `ended` is set, or in a hurry not."""
        if self._bytes_per_s is None or is_urgent():
            return
        with self._lock:
            now_s = time.monotonic()
            turn_s = max(now_s, self._free_at_s)
            self._free_at_s = turn_s + n_bytes / self._bytes_per_s
        while not is_urgent() and (left_s := turn_s - time.monotonic()) > 0:
            if ended.wait(min(left_s, _LOOK_S)):
                break
