"""The moment in which Orbax publishes a step: who awaits it, and what if nobody heard of it.

Orbax tells a handler nothing of it, but reports it through JAX's monitoring, whose listeners
anybody may clear. So ours is registered again where it hears nothing, and a publication that it did
not hear of is made up for when the thread has ended that made it, or, where that goes on because it
is the caller's, when the handler is next called or the process ends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence

import jax

from lazy_orbax._orbax.lifecycle import PUBLISHED_EVENTS, is_publishing_thread
from lazy_orbax.storage import threads
from lazy_orbax.timeline import Recorder

# Not one of Orbax's: whether our listener still hears what is reported.
_IS_HEARD_EVENT = "/lazy_orbax/is_heard"
_publishing = threading.local()
_log = logging.getLogger("lazy_orbax")


class Publication:
    """A step that Orbax publishes, in the thread in which this was created.

    Invariant, under the lock: what was awaited ends once, whether Orbax's report was heard, the
    publication failed, or nobody heard of it.

    Attributes:
        recorders: of the items of the step.
        sync: syncs what came with the publication.
        is_there: whether the step is published.
    """

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []
        self.sync: Callable[[], None] = lambda: None
        self.is_there: Callable[[], bool] = lambda: False
        self._thread = threading.current_thread()
        self._lock = threading.Lock()
        self.is_over = False

    def _end(self) -> bool:
        """Returns whether this is the one call that ends it."""
        with self._lock:
            was_over, self.is_over = self.is_over, True
        return not was_over

    def await_thread(self) -> None:
        """Waits until the thread has ended that publishes, if Orbax began it to publish."""
        if is_publishing_thread(self._thread):
            threading.Thread.join(self._thread)  # Orbax's own raises what it failed with.

    def succeed(self) -> None:
        """Syncs what was published, and ends the recorders. Later calls do nothing.

        Raises:
            NotDurableError: the storage refused, or did nothing for too long.
        """
        if not self._end():
            return
        try:
            self.sync()
        except BaseException as error:
            self._tell(committed=False, error=error)
            raise
        self._tell(committed=True, error=None)

    def fail(self, error: BaseException) -> None:
        """Ends the recorders with `error`. Later calls do nothing."""
        if self._end():
            self._tell(committed=False, error=error)

    def _tell(self, *, committed: bool, error: BaseException | None) -> None:
        for recorder in self.recorders:
            recorder.end(committed=committed, error=error)

    def catch_up(self) -> None:
        """Does what the report would have brought about, if the thread is past it.

        Raises:
            NotDurableError: the storage refused, or did nothing for too long.
        """
        is_past = not self._thread.is_alive() or self._thread is threading.current_thread()
        if self.is_over or not is_past:
            return
        if not self.is_there():  # Orbax gave it up.
            self._end()
            return
        _log.warning(
            "Orbax published %s, but its report did not reach lazy_orbax: somebody called "
            "jax.monitoring.clear_event_listeners() at that moment. It is synced only now. "
            "Whoever clears listeners should unregister their own instead.",
            ", ".join(recorder.timeline.directory for recorder in self.recorders),
        )
        self.succeed()


def await_publication(recorders: Sequence[Recorder]) -> Publication:
    """Ends `recorders` when Orbax, in this thread, reports that it published the step.

    Returns:
        What awaits it, the same for all items of the step.
    """
    _listen()
    publication = _awaited()
    if publication is None:
        publication = _publishing.awaited = Publication()
    publication.recorders += recorders
    return publication


def _awaited() -> Publication | None:
    """Returns what this thread is about to publish."""
    publication: Publication | None = getattr(_publishing, "awaited", None)
    return None if publication is None or publication.is_over else publication


def _listen() -> None:
    """Registers our listener, unless it is heard: anybody may have cleared it."""
    _publishing.is_heard = False
    with contextlib.suppress(Exception):  # What other listeners raise.
        jax.monitoring.record_event_duration_secs(_IS_HEARD_EVENT, 0.0)
    if not _publishing.is_heard:
        jax.monitoring.register_event_duration_secs_listener(_on_duration)


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    del duration_secs
    if event == _IS_HEARD_EVENT:
        _publishing.is_heard = True
    elif event in PUBLISHED_EVENTS and (publication := _awaited()) is not None:
        publication.succeed()


def publication_failed(error: BaseException) -> None:
    """Ends with `error` what waits in this thread for a publication."""
    if (publication := _awaited()) is not None:
        publication.fail(error)


class Publications:
    """What a handler finalized, until it is known to be published and synced, or given up.

    Invariant: who catches up has waited for whoever of ours is doing so, and knows what failed.
    """

    def __init__(self) -> None:
        self._one_by_one = threading.RLock()  # A report of a timeline may call the handler again.
        self._pending: list[Publication] = []
        self._failures: list[Exception] = []

    def add(self, publication: Publication) -> None:
        """Adds one, before Orbax publishes it."""
        if publication in self._pending:
            return
        self._pending.append(publication)
        with contextlib.suppress(RuntimeError):  # No thread is to be had: the next call does it.
            threads.run(functools.partial(self._await, publication), "lazy_orbax-publish")

    @property
    def has_pending(self) -> bool:
        """Whether one was not over when it was looked at last."""
        return bool(self._pending or self._failures)

    def _await(self, publication: Publication) -> None:
        """In a thread of ours: catches up when Orbax's has ended, though nobody calls."""
        publication.await_thread()
        self._catch_up(publication)

    def _catch_up(self, publication: Publication) -> None:
        with self._one_by_one:
            try:
                publication.catch_up()
            except Exception as error:  # noqa: BLE001 - `catch_up` raises it, now or in a later call.
                self._failures.append(error)

    def catch_up(self, *, raises: bool) -> None:
        """Syncs what was published without being heard of.

        Args:
            raises: whether the caller may be stopped. Else what failed is kept, for a later call.

        Raises:
            NotDurableError: the storage refused, or did nothing for too long.
        """
        for publication in self._pending:
            self._catch_up(publication)
        self._pending = [publication for publication in self._pending if not publication.is_over]
        if raises and self._failures:
            raise self._failures.pop(0)

    def end(self) -> list[Exception]:
        """Catches up for the last time. Returns what failed, of which nobody was told yet."""
        self.catch_up(raises=False)
        failures, self._failures = self._failures, []
        return failures
