"""Which snapshots of this process are there? Others wait here for one that is still copied."""

from __future__ import annotations

import collections
import threading

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity.files import Key

# What was told of so many snapshots is remembered.
_MOST = 16


class Announced:
    """What a trainer told of its snapshots.

    Invariant, under the lock: `_told` has the newest snapshots that were told of, each with whether
    it is there; `_served` has who was sent its stripe of those that are.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._changed = threading.Condition()
        self._told: collections.OrderedDict[Key, bool] = collections.OrderedDict()
        self._served: dict[Key, set[int]] = {}
        self._is_over = False

    def tell(self, key: Key, *, is_there: bool) -> None:
        """Notes what became of a snapshot."""
        with self._changed:
            self._told[key] = is_there
            if is_there:
                self._served.setdefault(key, set())
            while len(self._told) > _MOST:
                old, _ = self._told.popitem(last=False)
                self._served.pop(old, None)
            self._changed.notify_all()

    def was_served(self, key: Key, holder: int) -> None:
        """Notes that a member has its stripe of a snapshot."""
        with self._changed:
            if key in self._served:
                self._served[key].add(holder)
                self._changed.notify_all()

    def wait_for(self, key: Key, timeout_s: float) -> None:
        """Waits until a snapshot is there.

        Raises:
            KeeperError: it will not be, or was not in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: key in self._told or self._is_over, timeout_s)
            if not self._told.get(key, False):
                why = "will not be here" if key in self._told else "did not come in time"
                raise KeeperError(f"step {key.step} {why}")

    def wait_until_served(self, key: Key, n: int, timeout_s: float) -> bool:
        """Waits until so many members have their stripe of a snapshot. Returns whether they do."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_over or len(self._served.get(key, ())) >= n, timeout_s
            )

    def close(self) -> None:
        """Lets everybody go who waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
