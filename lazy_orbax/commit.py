"""The future that Orbax waits for, and what becomes of a save that Orbax gave up."""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import future

from lazy_orbax import _orbax, _paths, deadline, stock
from lazy_orbax.agreement import Agreement
from lazy_orbax.errors import SaveError
from lazy_orbax.leftovers import (
    Attempt,
    attempt_at,
    promised_directories,
    release_waiting,
)
from lazy_orbax.save import Save
from lazy_orbax.write import save_error

# Where Orbax sets no timeout: what it takes by default.
_TIMEOUT_S = 1200
# In which it waits for the items and publishes the step.
_ORBAX_THREAD = "async_save"
# How long an item may take to stop whose step has failed, unless its storage hangs.
_STOP_S = 10


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
        attempt: Attempt,
        agreement: Agreement | None = None,
        merge: Callable[[Any], None] | None = None,
    ):
        """Starts the thread.

        Args:
            save: what to write.
            directory: the item's directory, or Orbax's promise of it.
            custom_metadata: JSON-serializable, stored beside the tree.
            attempt: at the step that the item is of.
            agreement: the processes that write the item with this one, if there are any.
            merge: merges in a directory what several processes wrote.

        Raises:
            SaveError: another item of the step has failed already.
        """
        self.save = save
        self.is_merged = self.has_others = False
        self._others: Sequence[Any] = ()
        self._agreement, self._merge = agreement, merge
        self._told = False
        self._told_in: threading.Thread | None = None
        self._is_clean = self._may_come = False
        self._directory: Any = None
        self._operation = _orbax.operation_id()
        self._attempt = attempt
        attempt.join(self)
        self._coroutine = self._write(directory, custom_metadata)
        self._future = future.CommitFutureAwaitingContractedSignals(
            self._coroutine, name="lazy_orbax-write"
        )

    @property
    def error(self) -> BaseException | None:
        """Why there is no such step, as far as is known."""
        return self.save.recorder.timeline.error

    def include(self, others: Sequence[Any]) -> None:
        """Adds futures of what Orbax's own type handlers write of the item."""
        self._others, self.has_others = others, bool(others)

    def result(self, timeout: float | None = None) -> None:
        """Waits until the item is durable, on every process that writes it.

        Raises:
            SaveError: it failed, here or on another process.
            TimeoutError: it takes longer than `timeout` seconds, or the directory never came.
        """
        deadline_s = time.monotonic() + (_TIMEOUT_S if timeout is None else timeout)
        self._told_in = threading.current_thread()
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
                self._clean_up(self.save.failure)
            raise
        failure = self._settle(deadline_s - time.monotonic())
        self._handed_on()
        if failure is not None:
            self.save.recorder.end(error=failure)
            self._clean_up(failure)
            raise failure

    async def _write(self, directory: Any, custom_metadata: Any) -> None:
        if self._told:  # There will be no directory.
            return
        self._directory = await stock.created(directory)
        if not self._attempt.root:  # It may have had no name before.
            of_all = self._attempt.removes_all
            self._attempt = attempt_at(str(self._directory), self._operation, removes_all=of_all)
            self._attempt.join(self)
        self.save.write(str(self._directory), custom_metadata)

    def _clean_up(self, failure: SaveError | None) -> None:
        """Removes what was written of a step that has failed. Orbax must not be at a later one."""
        attempt = self._attempt
        for commit in attempt.commits:
            if commit is not self:  # This one was waited for, as long as was allowed.
                commit._stop(failure)
        items = [str(commit._directory) for commit in attempt.commits if commit._directory]
        writing = any(commit.save.is_writing for commit in attempt.commits)
        if writing or not all(map(deadline.is_quiet, items)):
            return  # It is tried again when the next save begins.
        if self._agreement is None or not self._agreement.shares_directory:
            everything = attempt.removes_all
        else:
            everything = attempt.removes_all and self._agreement.all_told()
        gone = attempt.remove(items, None if everything else self.save.own_directories)
        # The others' part of it is what they or the next save remove.
        self._is_clean = gone and (everything or not attempt.removes_all)

    def _stop(self, failure: SaveError | None) -> None:
        """Ends the save of an item whose step has failed, and waits until it writes no more."""
        if failure is not None and not self._told:
            self._fail(SaveError(f"another item of the step failed: {failure.what}"))
            self._handed_on()
        if self.save.is_writing:
            with contextlib.suppress(Exception):
                self._future.result(timeout=_STOP_S)

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
        failure = save_error(self.save.path, error)
        failure.__cause__ = error
        return failure

    def _handed_on(self) -> None:
        self._told = True
        self.save.forget()

    def outcome(self) -> BaseException | None:
        """Waits for the end and returns what went wrong, if nobody was told yet."""
        try:
            if self._is_given_up(threading.current_thread()):
                self._forgo_directory()
            if not self._told and self._agreement is not None:
                # Nobody here waited for it, so perhaps nobody elsewhere does.
                self._abandon(SaveError("Orbax gave this save up"))
            elif not self._told:
                self.result()
        except Exception as error:  # noqa: BLE001 - `close` raises it.
            return error
        finally:
            if self._is_given_up(None):
                self._remove_leftovers()
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
            _paths.places_of_run(recorder.timeline.directory) & _paths.places_of_run(place)
        )
        if passed_over:
            self._forgo_directory()
        if passed_over and self._is_given_up(threading.current_thread()):
            self._remove_leftovers()
        if passed_over and self.save.is_over:
            recorder.end()
        return recorder.is_complete and self._is_clean

    def clean_up(self) -> None:
        """Waits until Orbax has ended with the step, and removes it if it was not published."""
        if self._told_in is not None and self._told_in is not threading.current_thread():
            self._told_in.join()
        if self._is_given_up(threading.current_thread()):
            self._forgo_directory()
            self._remove_leftovers()

    def _forgo_directory(self) -> None:
        """Ends the save if it still waits for a directory. Orbax could not create it."""
        if not self.save.write_began and promised_directories(self._operation):
            self._fail(SaveError("Orbax could not create the directory"))
            self._handed_on()
            # A thread of Orbax that is released may create it yet.
            self._may_come = release_waiting(self._operation)
            if not self._may_come:
                self._never_run()

    def _is_given_up(self, this_thread: threading.Thread | None) -> bool:
        """Whether nobody is left who could publish the step, if it is not published yet.

        Args:
            this_thread: which Orbax has left where it is the one that waited for the item.
        """
        waited = {commit._told_in for commit in self._attempt.commits} - {None, this_thread}
        if waited or this_thread is None:
            return bool(waited) and not any(thread.is_alive() for thread in waited)
        return _ORBAX_THREAD not in {thread.name for thread in threading.enumerate()}

    def _remove_leftovers(self) -> None:
        """Removes what is there of a step that is not published and will not be."""
        committed = self.save.recorder.timeline.committed_s is not None
        if committed or not self._attempt.is_there:
            self._is_clean, self._may_come = not self._may_come, False
        elif not self._is_clean:
            failure = self.save.failure or SaveError("Orbax did not publish the step")
            self.save.recorder.end(error=failure)
            self._clean_up(failure)

    def cancel(self) -> None:
        """Stops writing and returns the host memory."""
        for running in (self._future, *self._others):
            running.cancel()
        self._abandon(concurrent.futures.CancelledError("The save was cancelled."))

    def give_up(self, error: BaseException) -> SaveError:
        """Ends what `save()` has raised, and the other items of the step. Returns its failure."""
        failure = self.save.failure or self._failure(error)
        self._handed_on()
        if all(commit.save.write_began for commit in self._attempt.commits):
            self._stop(failure)
            self._clean_up(failure)
        else:  # Orbax may be creating the directories; they go when the next save begins.
            for commit in self._attempt.commits:
                commit._stop(failure)
        return failure

    def _fail(self, error: BaseException) -> None:
        self.save.abandon(error)
        if self._agreement is not None and not self._told:
            self._agreement.settle(self.save.failure or self._failure(error), None, 0)

    def _abandon(self, error: BaseException) -> None:
        self._fail(error)
        self._never_run()

    def _never_run(self) -> None:
        # Where Orbax's thread will not run it any more, Python would complain of that.
        if inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
            self._coroutine.close()
