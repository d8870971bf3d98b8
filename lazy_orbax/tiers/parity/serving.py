"""What a node gives to the others: what it has, as soon as that is there, at a limited speed."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.storage.pace import Pace
from lazy_orbax.tiers.parity import files, stripes
from lazy_orbax.tiers.parity.announced import Announced
from lazy_orbax.tiers.parity.files import Key, Member
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.shelf import Shelf

_MOST_OPEN = 4
# In an exchange, what was not sent because nobody asked is made up for.
_LATE_S = 1.0


class Serving:
    """Answers what members ask, from many threads.

    Invariant, under the lock: `_open` has the files that were read last; `_exchanged` is the
    snapshot that the pace is of.

    Attributes:
        announced: which snapshots are there.
        sent_bytes: bytes of snapshots that went out for exchanges.
    """

    def __init__(self, settings: NodeSettings):
        """Begins with nothing open."""
        self._settings, self._shelf = settings, Shelf(settings.directory)
        self.announced, self.sent_bytes = Announced(), 0
        self._pace = Pace(settings.bytes_per_s, late_s=_LATE_S, is_paid_before=True)
        self._over, self._exchanged = threading.Event(), None
        self._lock = threading.Lock()
        self._open: dict[tuple[str, Key, int], files.Opened] = {}

    def answer(self, told: dict[str, Any]) -> dict[str, Any]:
        """Says which snapshot there is, as soon as there is."""
        key = Key.told(told)
        self.announced.wait_for(key, min(float(told["wait_s"]), self._settings.timeout_s))
        process = self._settings.process
        snapshot = files.snapshot_of(self._shelf, self._settings.run, process, key)
        return dataclasses.asdict(Member(process, snapshot.n_bytes, snapshot.serial))

    def read(self, told: dict[str, Any], first: int, end: int) -> tuple[int, memoryview]:
        """Returns bytes of a stripe, of a whole snapshot, or of parity, and their digest before."""
        key, what = Key.told(told), str(told["what"])
        if what == "exchange":
            self._begin(key)
        opened = self._opened(what, key, int(told["process"]))
        begins, ends = opened.begins, opened.ends
        if what in ("stripe", "exchange"):
            place = (int(told[name]) for name in ("n", "owner", "holder"))
            begins, ends = stripes.stripe_of(ends, *place)
        if begins + end > ends:
            raise KeeperError(f"{end} bytes are wanted of {ends - begins}")
        if what == "exchange":
            self._pace.await_turn(end - first, self._over)
            with self._lock:
                self.sent_bytes += end - first
        chunk = opened.memory[begins + first : begins + end].data
        digest = digest_of_bytes(chunk)
        # What is overwritten from here on has another digest when it comes.
        if not opened.is_as_it_was():
            raise KeeperError(f"step {key.step} was overwritten while it was sent")
        if what == "exchange" and begins + end == ends:
            self.announced.was_served(key, int(told["holder"]))
        return digest, chunk

    def _begin(self, key: Key) -> None:
        """Makes a new snapshot one that nothing is made up for."""
        with self._lock:
            if key != self._exchanged:
                self._exchanged = key
                self._pace.begin()

    def _opened(self, what: str, key: Key, process: int) -> files.Opened:
        """Returns a file to read. The last ones stay open, until they are overwritten."""
        name = ("parity" if what == "parity" else "snapshot", key, process)
        with self._lock:
            found = self._open.pop(name, None)
            if found is None or not found.is_as_it_was():
                find = files.parity_of if name[0] == "parity" else files.snapshot_of
                found = files.opened(find(self._shelf, self._settings.run, process, key))
            self._open[name] = found
            while len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]
            return found

    def close(self) -> None:
        """Lets everybody go who waits."""
        self._over.set()
        self.announced.close()
