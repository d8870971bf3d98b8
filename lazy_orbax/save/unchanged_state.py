"""Notices a save that holds the very same bytes as the one before it."""

from __future__ import annotations

import logging
import threading

from lazy_orbax.timeline import Recorder

_LOG = logging.getLogger("lazy_orbax")


class Fingerprints:
    """What the last save of each item held, to notice one that holds the same again.

    Invariant, under the lock: for each place, the last save that became durable.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, tuple[str, str, bool]] = {}

    def compare(self, recorder: Recorder, fingerprint: str) -> None:
        """Notes in a save's timeline, and once in a row in the log, that it held nothing new.

        Args:
            recorder: of a save that is durable.
            fingerprint: of what was saved.
        """
        directory = recorder.timeline.directory
        place = recorder.item
        with self._lock:
            before, content, was_same = self._last.get(place, ("", "", False))
            is_same = content == fingerprint
            self._last[place] = (directory, fingerprint, is_same)
        if is_same:
            recorder.note(same_as=before)
            if not was_same:
                _LOG.warning(
                    "%s holds the very same bytes as %s: perhaps the program saves a state that it "
                    "no longer trains.",
                    directory,
                    before,
                )
