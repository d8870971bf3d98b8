"""The timelines of a save and of a restore: their moments, their bytes, and which way they went."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError
from lazy_orbax.view import moments
from lazy_orbax.view.blocks import Spans
from lazy_orbax.view.viewed import Viewed

# How long a save waits for `on_timeline` to return.
_PATIENCE_S = 5.0
# What of Orbax `on_timeline` must not call: of managers, checkpointers and the functions of v1.
_REFUSED = frozenset(
    f"{name}{ending}"
    for name in ("save", "save_pytree", "save_checkpointables")
    for ending in ("", "_async")
) | {"wait_until_finished"}
_log = logging.getLogger("lazy_orbax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveTimeline(Viewed):
    """What happened to one saved item.

    Each field that ends in `_s`, but for `waited_s`, is a moment: seconds from the call of the
    handler's save to it. A moment is `None` if it has not come, or never will, because the save
    failed before.

    Attributes:
        directory: the final path of the item.
        step: the number of the step, or `None` if the path does not tell it.
        mode: `"stage"`, `"direct"`, `"copy"` (on CPU, where `save()` did not wait for a program
            to be compiled), `"in_step"` (the step had copied already), several joined by `+`, or
            `"host"` if no leaf was on a device.
        reason: why `mode` was chosen, for each of its parts.
        bytes_written: how many bytes of arrays this process wrote, before compression.
        bytes_linked: of these, how many were in the step before as they are now, so that their
            files were linked, and not written (`LazyOptions.skip_unchanged`).
        waited_s: how many seconds `save()` waited for host memory.
        planned_s: it was known what is written where.
        enqueued_s: all bytes were out of reach of donation. `save()` returned soon after.
        staged_s: every byte was in host memory, and the device memory of the copy was free.
        durable_s: every byte was on storage and synced.
        committed_s: Orbax had published the step, and that was synced. Only the process that
            publishes knows it.
        error: why the save failed, or `None`.
        same_as: the directory of the save before of this item, by the same handler, if this
            process then wrote the very same bytes: perhaps the state is no longer trained.
    """

    directory: str
    step: int | None
    mode: str = "host"
    reason: str = ""
    bytes_written: int = 0
    bytes_linked: int = 0
    waited_s: float = 0.0
    planned_s: float | None = None
    enqueued_s: float | None = None
    staged_s: float | None = None
    durable_s: float | None = None
    committed_s: float | None = None
    error: BaseException | None = None
    same_as: str | None = None

    def blocks(self) -> tuple[Spans, ...]:
        """Returns what there is to see."""
        told = {part: getattr(self, field) for part, field in moments.SAVE.items()}
        row = moments.row_of("saved", told, self.bytes_written, self.error)
        return (moments.spans_of(self.directory, [row], moments.SAVE),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreTimeline(Viewed):
    """What happened to one restored item, on this process. Times are seconds since `restore()`.

    Attributes:
        directory: the item's directory.
        n_leaves: leaves that were read by plan.
        bytes_wanted: bytes of those leaves that this process needs, as they are stored.
        bytes_read: bytes that were read for them: of plain chunks those of the files, of encoded
            ones those that came out. Short chunks, which are in the tree of a database, came with
            the tree.
        requests: reads of the storage that this took.
        by_orbax: the leaves that Orbax restored, by name, with the reason.
        transforms: what the rules came to (`TransformPlan.report`), if there were any.
        all_by_orbax: why Orbax restored all of it, or `None`.
        planned_s: what is where was known, and the first read began.
        first_byte_s: the first leaves had come.
        read_s: all of them had come.
        on_device_s: they were arrays, the leaves of Orbax too.
        verified_s: what the digests say was looked at; `None` where there are none.
        error: why the restore failed, or `None`.
    """

    directory: str
    n_leaves: int = 0
    bytes_wanted: int = 0
    bytes_read: int = 0
    requests: int = 0
    by_orbax: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transforms: Mapping[str, Any] | None = None
    all_by_orbax: str | None = None
    planned_s: float | None = None
    first_byte_s: float | None = None
    read_s: float | None = None
    on_device_s: float | None = None
    verified_s: float | None = None
    error: BaseException | None = None

    def blocks(self) -> tuple[Spans, ...]:
        """Returns what there is to see."""
        told = {part: getattr(self, field) for part, field in moments.RESTORE.items()}
        row = moments.row_of("restored", told, self.bytes_read, self.error)
        return (moments.spans_of(self.directory, [row], moments.RESTORE),)


class RestoreRecorder:
    """Fills in one `RestoreTimeline`, and tells how far the restore is.

    Attributes:
        timeline: so far.
        ended_by: what the user's own function raised: the checkpoint is not to blame for it.
    """

    def __init__(self, directory: str, progress: Callable[[int, int], None] | None = None):
        """Starts the clock.

        Args:
            directory: the item's directory.
            progress: what is called with the bytes that have come and all that will.
        """
        self._start_s = time.perf_counter()
        self._progress = progress
        self.timeline = RestoreTimeline(directory=directory)
        self.ended_by: Exception | None = None

    def note(self, **facts: object) -> None:
        """Replaces fields of the timeline."""
        self.timeline = dataclasses.replace(self.timeline, **facts)

    def mark(self, *names: str) -> None:
        """Timestamps moments that have none yet: planned, first_byte, read, on_device, verified."""
        now_s = time.perf_counter() - self._start_s
        fields = [f"{name}_s" for name in names if getattr(self.timeline, f"{name}_s") is None]
        self.note(**dict.fromkeys(fields, now_s))

    def arrived(self, done_bytes: int) -> None:
        """Tells how many of the wanted bytes have come. What that raises ends the restore."""
        self.mark("first_byte")
        if self._progress is not None:
            try:
                self._progress(done_bytes, self.timeline.bytes_wanted)
            except Exception as error:
                self.ended_by = error
                raise

    @property
    def is_by_plan(self) -> bool:
        """Whether some leaves were read by plan."""
        return self.timeline.read_s is not None and self.timeline.all_by_orbax is None

    def report(self, on_restore: Callable[[RestoreTimeline], None] | None) -> None:
        """Hands the timeline out. What that raises is logged: the restore has ended."""
        if on_restore is not None:
            try:
                on_restore(self.timeline)
            except Exception:  # noqa: BLE001 - Nobody else could tell of it.
                _log.exception("on_restore raised for %s", self.timeline.directory)


class Recorder:
    """Fills in one `SaveTimeline` and hands it out once, when it is complete.

    Invariant, under the lock: `on_timeline` was called if and only if `_reported` is true, and
    the timeline does not change after that.

    Attributes:
        path: the item's directory, as Orbax named it before it existed.
        item: what the directories of the saved item have in common over the steps of a run.
    """

    def __init__(
        self,
        path: str,
        on_timeline: Callable[[SaveTimeline], None] | None,
        record: Callable[[SaveTimeline], None] = lambda timeline: None,
    ):
        """Starts the clock.

        Args:
            path: the item's directory, as Orbax named it.
            on_timeline: the user's function, which is called once at the end.
            record: called just before it.
        """
        self._lock = threading.Lock()
        self._start_s = time.perf_counter()
        directory, self.item, self.path = _paths.final(path), _paths.item_of(path), path
        self._timeline = SaveTimeline(directory=directory, step=_paths.step_of_item(path))
        self._on_timeline, self._record = on_timeline, record
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
        """Timestamps `moment`: planned, enqueued, staged or durable."""
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
        self._record(self._timeline)
        if self._on_timeline is not None:
            _report(self._on_timeline, self._timeline)


def _report(on_timeline: Callable[[SaveTimeline], None], timeline: SaveTimeline) -> None:
    """Calls `on_timeline` in a thread of its own, and waits for it, but not for ever.

    This may be the thread of Orbax that everybody waits for who saves: a call of it that waits in
    turn, or raises, would hang or undo a save that succeeded.
    """

    def call() -> None:
        sys.setprofile(_refuse_to_save)  # It sees the calls of this thread alone.
        try:
            on_timeline(timeline)
        except BaseException:  # noqa: BLE001 - Nobody else could tell of it.
            _log.exception("on_timeline raised for %s", timeline.directory)
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=call, name="lazy_orbax-timeline", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # There are too many threads, or the interpreter is shutting down.
        call()
        return
    thread.join(_PATIENCE_S)
    if thread.is_alive():
        _log.warning(
            "on_timeline has not returned within %s s for %s. The save goes on without it.",
            _PATIENCE_S,
            timeline.directory,
        )


def _refuse_to_save(frame: types.FrameType, event: str, _: object) -> None:
    """Raises as soon as Orbax is called to save, before it has begun to, or to wait for a save."""
    name, module = frame.f_code.co_name, str(frame.f_globals.get("__name__"))
    if event != "call" or name not in _REFUSED or not module.startswith("orbax."):
        return
    caller = frame.f_back.f_globals.get("__name__") if frame.f_back else None
    if name == "wait_until_finished" and str(caller).startswith("orbax."):
        return  # It is restoring, say: that only takes its time.
    raise OptionError(
        f"on_timeline called {name}() of Orbax. The save that it is told of waits for it to "
        "return, and Orbax saves from one thread at a time. Note there, in a threading.Event say, "
        "what is to be done, and do it in the training loop."
    )
