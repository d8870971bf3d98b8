"""The timeline of a save: its four moments, its bytes, its mode."""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable

from lazy_orbax import file_names

_log = logging.getLogger("lazy_orbax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveTimeline:
    """What happened to one saved item. Times are seconds since its `save()` was entered.

    Attributes:
        directory: the item's final directory.
        step: the step, where the path tells it.
        mode: `"stage"`, `"direct"`, `"in_step"` (the step had copied already), several joined by
            `+`, or `"host"` if no leaf was on a device.
        reason: why, for each of them.
        bytes_written: bytes that this process wrote, before compression.
        waited_s: how long `save()` waited for host memory.
        enqueued_s: `save()` returned; the arrays may be donated.
        staged_s: every byte was in host memory.
        durable_s: every byte was on storage, synced.
        committed_s: Orbax published the step, and that was synced. Known on the process that
            publishes.
        error: why the save failed, or `None`.
        same_as: the directory of the save before of this item, by the same handler, if this
            process then wrote the very same bytes: perhaps the state is no longer trained.
    """

    directory: str
    step: int | None
    mode: str = "host"
    reason: str = ""
    bytes_written: int = 0
    waited_s: float = 0.0
    enqueued_s: float | None = None
    staged_s: float | None = None
    durable_s: float | None = None
    committed_s: float | None = None
    error: BaseException | None = None
    same_as: str | None = None


class Recorder:
    """Fills in one `SaveTimeline` and hands it out once, when it is complete.

    Invariant, under the lock: `on_timeline` was called if and only if `_reported` is true, and
    the timeline does not change after that.
    """

    def __init__(self, path: str, on_timeline: Callable[[SaveTimeline], None] | None):
        self._lock = threading.Lock()
        self._start_s = time.perf_counter()
        directory = final_directory(path)
        self._timeline = SaveTimeline(directory=directory, step=step_of(directory))
        self._on_timeline = on_timeline
        self._reported = False

    @property
    def timeline(self) -> SaveTimeline:
        """The timeline so far."""
        return self._timeline

    @property
    def is_complete(self) -> bool:
        """Whether the timeline was reported and will not change."""
        return self._reported

    def since_start_s(self) -> float:
        """Seconds since `save()` was entered."""
        return time.perf_counter() - self._start_s

    def note(self, **facts: object) -> None:
        """Replaces fields of the timeline."""
        with self._lock:
            if not self._reported:
                self._timeline = dataclasses.replace(self._timeline, **facts)

    def mark(self, moment: str) -> None:
        """Timestamps `moment`: enqueued, staged or durable."""
        self.note(**{f"{moment}_s": self.since_start_s()})

    def end(self, *, committed: bool = False, error: BaseException | None = None) -> None:
        """Completes the timeline and reports it. Later calls do nothing."""
        with self._lock:
            if self._reported:
                return
            self._reported = True
            committed_s = self.since_start_s() if committed else None
            self._timeline = dataclasses.replace(
                self._timeline, committed_s=committed_s, error=error
            )
        if self._on_timeline is None:
            return
        try:
            self._on_timeline(self._timeline)
        except Exception:  # noqa: BLE001 - A callback must not undo a save that succeeded.
            _log.exception("on_timeline raised for %s", self._timeline.directory)


def final_directory(path: str) -> str:
    """Returns the path that a temporary directory of Orbax has once it is published."""
    return re.sub(rf"{re.escape(file_names.TEMPORARY)}[^/]*", "", path)


def step_of(directory: str) -> int | None:
    """Returns the step in an item path such as `run/12/state`, if there is one."""
    last_two = directory.rstrip("/").split("/")[:-3:-1]
    for pattern in (r"(\d+)", r".*[_-](\d+)"):
        for part in last_two:
            if match := re.fullmatch(pattern, part):
                return int(match.group(1))
    return None
