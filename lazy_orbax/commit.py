"""The future that Orbax waits for, and what becomes of a save that Orbax gave up."""

from __future__ import annotations

import concurrent.futures
import inspect
from typing import Any

from orbax.checkpoint import future

from lazy_orbax import _orbax, stock
from lazy_orbax.errors import SaveError
from lazy_orbax.save import Save


class Commit:
    """What Orbax waits for: `Save.write`, in a thread that starts when the directory exists."""

    def __init__(self, save: Save, directory: Any, custom_metadata: Any):
        """Starts the thread.

        Args:
            save: what to write.
            directory: the item's directory, or Orbax's promise of it.
            custom_metadata: JSON-serializable, stored beside the tree.
        """
        self.save = save
        self._told = False
        self._operation = _orbax.operation_id()
        self._coroutine = _write(save, directory, custom_metadata)
        self._future = future.CommitFutureAwaitingContractedSignals(
            self._coroutine, name="lazy_orbax-write"
        )

    def result(self, timeout: float | None = None) -> None:
        """Waits until the item is durable.

        Raises:
            SaveError: it failed.
            TimeoutError: it takes longer than `timeout` seconds, or the directory never came.
        """
        try:
            self._future.result(timeout=timeout)
        except BaseException as error:
            if timeout is None or not isinstance(error, TimeoutError) or self.save.is_over:
                # Orbax may have given up before `Save.write` ran, which would have cleaned up.
                self._abandon(error)
                self._handed_on()
            raise
        self._handed_on()

    def _handed_on(self) -> None:
        self._told = True
        self.save.forget()

    def outcome(self) -> BaseException | None:
        """Waits for the end and returns what went wrong, if nobody was told yet."""
        try:
            if not self._told:
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
        self._future.cancel()
        self._abandon(concurrent.futures.CancelledError("The save was cancelled."))

    def _abandon(self, error: BaseException) -> None:
        self.save.abandon(error)
        # Where Orbax's thread will not run it any more, Python would complain of that.
        if inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
            self._coroutine.close()


def _parents(place: str) -> set[str]:
    """Returns the directories that a manager of `place` may own: its own and the step's."""
    parent = place.rpartition("/")[0]
    return {parent, parent.rpartition("/")[0]} - {""}


async def _write(save: Save, directory: Any, custom_metadata: Any) -> None:
    save.write(str(await stock.created(directory)), custom_metadata)
