"""The future that Orbax waits for, and what becomes of a save that Orbax gave up."""

from __future__ import annotations

import concurrent.futures
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import future

from lazy_orbax import _orbax, stock
from lazy_orbax.agreement import Agreement
from lazy_orbax.errors import SaveError
from lazy_orbax.save import Save
from lazy_orbax.write import save_error

# Where Orbax sets no timeout: what it takes by default.
_TIMEOUT_S = 1200


class Commit:
    """What Orbax waits for: `Save.write`, in a thread that starts when the directory exists.

    With several processes it then waits until each of them has written, and merges what they
    wrote while all can still be told that this failed.
    """

    def __init__(
        self,
        save: Save,
        directory: Any,
        custom_metadata: Any,
        *,
        others: Sequence[Any] = (),
        agreement: Agreement | None = None,
        merge: Callable[[Any], None] | None = None,
    ):
        """Starts the thread.

        Args:
            save: what to write.
            directory: the item's directory, or Orbax's promise of it.
            custom_metadata: JSON-serializable, stored beside the tree.
            others: futures of what Orbax's own type handlers write of the item.
            agreement: the processes that write the item with this one, if there are any.
            merge: merges in a directory what several processes wrote.
        """
        self.save = save
        self.is_merged, self.has_others = False, bool(others)
        self._others, self._agreement, self._merge = others, agreement, merge
        self._told = False
        self._directory: Any = None
        self._operation = _orbax.operation_id()
        self._coroutine = self._write(directory, custom_metadata)
        self._future = future.CommitFutureAwaitingContractedSignals(
            self._coroutine, name="lazy_orbax-write"
        )

    def result(self, timeout: float | None = None) -> None:
        """Waits until the item is durable, on every process that writes it.

        Raises:
            SaveError: it failed, here or on another process.
            TimeoutError: it takes longer than `timeout` seconds, or the directory never came.
        """
        deadline_s = time.monotonic() + (_TIMEOUT_S if timeout is None else timeout)
        try:
            self._future.result(timeout=timeout)
            for other in self._others:
                other.result(timeout=None if timeout is None else deadline_s - time.monotonic())
            if self.save.failure is not None:
                raise self.save.failure
        except BaseException as error:
            gave_up = timeout is None or not isinstance(error, TimeoutError) or self.save.is_over
            if gave_up or self._agreement is not None:
                # Orbax may have given up before `Save.write` ran, which would have cleaned up.
                self._abandon(error)
                self._handed_on()
            raise
        failure = self._settle(deadline_s - time.monotonic())
        self._handed_on()
        if failure is not None:
            self.save.recorder.end(error=failure)
            raise failure

    async def _write(self, directory: Any, custom_metadata: Any) -> None:
        self._directory = await stock.created(directory)
        self.save.write(str(self._directory), custom_metadata)

    def _settle(self, timeout_s: float) -> SaveError | None:
        """Waits for the other processes. Returns what failed, on any of them."""
        if self._agreement is None:
            return None
        failure = None if self._agreement.shares_directory else self._merged()
        finish = self._merged if self._agreement.shares_directory else None
        return self._agreement.settle(failure, finish, timeout_s)

    def _merged(self) -> SaveError | None:
        assert self._merge is not None
        try:
            self._merge(self._directory)
            self.is_merged = True
        except Exception as error:  # noqa: BLE001 - It is raised on every process.
            return self._failure(error)
        return None

    def _failure(self, error: BaseException) -> SaveError:
        failure = save_error(self.save.recorder.timeline.directory, error)
        failure.__cause__ = error
        return failure

    def _handed_on(self) -> None:
        self._told = True
        self.save.forget()

    def outcome(self) -> BaseException | None:
        """Waits for the end and returns what went wrong, if nobody was told yet."""
        try:
            if not self._told and self._agreement is not None:
                # Nobody here waited for it, so perhaps nobody elsewhere does.
                self._abandon(SaveError("Orbax gave this save up"))
            elif not self._told:
                self.result()
        except Exception as error:  # noqa: BLE001 - `close` raises it.
            return error
        finally:
            self.save.recorder.end()
        return None

    def is_past(self, place: str) -> bool:
        """Whether nothing more will come of the save, now that the next one begins.

        Orbax says nothing to a handler when it cannot create a directory, nor, on a process that
        does not publish, when it has published one. But it starts no save below the same
        directory before it has done with the one before.

        Args:
            place: where the next save goes.
        """
        recorder = self.save.recorder
        passed_over = self._operation != _orbax.operation_id() and bool(
            _parents(recorder.timeline.directory) & _parents(place)
        )
        if passed_over and not self.save.write_began and not self.save.is_over:
            self._abandon(SaveError("Orbax could not create the directory"))
        if passed_over and self.save.is_over:
            recorder.end()
        return recorder.is_complete

    def cancel(self) -> None:
        """Stops writing and returns the host memory."""
        for running in (self._future, *self._others):
            running.cancel()
        self._abandon(concurrent.futures.CancelledError("The save was cancelled."))

    def _abandon(self, error: BaseException) -> None:
        self.save.abandon(error)
        if self._agreement is not None and not self._told:
            self._agreement.settle(self.save.failure or self._failure(error), None, 0)
        # Where Orbax's thread will not run it any more, Python would complain of that.
        if inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
            self._coroutine.close()


def _parents(place: str) -> set[str]:
    """Returns the directories that a manager of `place` may own: its own and the step's."""
    parent = place.rpartition("/")[0]
    return {parent, parent.rpartition("/")[0]} - {""}
