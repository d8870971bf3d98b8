"""How long the storage may do nothing, and what may still be written when that was too long."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.storage import threads
from lazy_orbax.storage.places import place_of
from lazy_orbax.storage.threads import await_progress

_LONGEST_LOOK_S = 10.0


class Outstanding:
    """What this process may still write to object stores, by the directory that it goes to.

    A write cannot be called back: when we have given it up, TensorStore goes on trying for a while.
    A later save to the same directory has objects of the same names, over which it would write.

    Invariant, under the lock: while a save may hand writes to TensorStore, and while TensorStore
    may still carry out one that was given up, a future that is not done is in `_futures`. A save
    hands over its first write only when there was none, and in the same moment has its own there.
    `_left` are the directories to which writes may have come after Orbax had emptied them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[str, list[Any]] = {}
        self._left: set[str] = set()

    def leave(self, directory: str, futures: Iterable[Any]) -> None:
        """Adds what is given up: futures, of TensorStore or of Python."""
        with self._lock:
            self._futures.setdefault(directory, []).extend(futures)
            self._left.add(directory)

    def enter(self, directory: str, future: Any, timeout_s: float) -> bool:
        """Adds a future once no other is there. Returns whether something was left there.

        Raises:
            TimeoutError: another is still there after `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        waited = False
        while True:
            with self._lock:
                pending = {
                    place: [f for f in futures if not f.done()]
                    for place, futures in self._futures.items()
                }
                self._futures = {place: futures for place, futures in pending.items() if futures}
                here = self._futures.setdefault(directory, [future])
                if here == [future]:
                    waited = waited or directory in self._left
                    self._left.discard(directory)
                    return waited
            waited = True
            here[0].exception(timeout=max(0.0, deadline_s - time.monotonic()))

    def is_quiet(self, directory: str) -> bool:
        """Whether nothing is there that may still write to the directory."""
        with self._lock:
            return all(future.done() for future in self._futures.get(directory, ()))


_OUTSTANDING = Outstanding()


def is_quiet(directory: str) -> bool:
    """Whether nothing that a save was given may still come to an item's (final) directory."""
    return _OUTSTANDING.is_quiet(_paths.final(directory))


class Deadline:
    """How long the storage may acknowledge nothing, and in a local directory write nothing.

    Of one save of one item: from `begin` to `end` it may write.
    """

    def __init__(self, directory: str, timeout_s: float):
        self._timeout_s, self._place = timeout_s, place_of(directory, timeout_s)
        self._is_missed = False
        self._written: int | None = None
        self._final = _paths.final(directory)
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()

    def begin(self) -> bool:
        """Waits until nothing of a failed save can come to the directory any more.

        Returns:
            Whether something may have come after Orbax had emptied the directory.

        Raises:
            TimeoutError: it still can.
        """
        try:
            return _OUTSTANDING.enter(self._final, self._ended, self._timeout_s)
        except TimeoutError as error:
            raise TimeoutError(
                f"an earlier save to this place failed, and for {self._timeout_s:g} s "
                "(LazyOptions.storage_timeout_s) the storage still had not acknowledged what it "
                "was given then, which could be written over this save at any time. Save another "
                "step now, or this one some minutes later"
            ) from error

    def end(self, unfinished: Sequence[Any]) -> None:
        """Gives up what was not acknowledged. What cannot be called back is remembered.

        Args:
            unfinished: futures of TensorStore.
        """
        if not self._place.gives_up and not self._is_missed:
            # Something else went wrong. What was handed over is soon written, or refused as well.
            with contextlib.suppress(TimeoutError):
                for future in unfinished:
                    self._await(future)
            unfinished = [future for future in unfinished if not future.done()]
        if unfinished:
            _OUTSTANDING.leave(self._final, unfinished)
        if not self._ended.done():
            self._ended.set_result(None)

    def result_of(self, future: Any) -> Any:
        """Waits for a future, of TensorStore or of Python.

        Raises:
            TimeoutError: the storage did not acknowledge in time.
        """
        self._await(future)
        return future.result()

    def _await(self, future: Any) -> None:
        """Waits until a future is done, as long as there is progress."""
        try:
            await_progress(
                [future],
                timeout_s=self._timeout_s,
                what="the storage acknowledged nothing",
                goes_on=lambda: self._writes_on(),
            )
        except TimeoutError:
            self._is_missed = True
            raise

    def _writes_on(self) -> bool:
        """Whether the directory has grown since this was asked: a large piece takes long."""
        before, self._written = self._written, None
        with contextlib.suppress(TimeoutError, OSError):  # Where the storage hangs, looking does.
            looking = threads.run(self._place.progress, "lazy_orbax-look")
            self._written = looking.result(min(self._timeout_s, _LONGEST_LOOK_S))
        return self._written not in (None, before)

    def run(self, work: Callable[[], None], name: str) -> None:
        """Runs what Orbax does for us on the storage, and gives it up when nothing happens.

        Args:
            work: what to run.
            name: of the thread in which it runs.

        Raises:
            TimeoutError: for too long nothing was done.
        """
        outcome = threads.run(work, name)
        try:
            self.result_of(outcome)
        finally:
            if not outcome.done():
                _OUTSTANDING.leave(self._final, [outcome])
