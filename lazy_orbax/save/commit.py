"""The future that Orbax waits for."""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lazy_orbax._orbax import handed_in, lifecycle
from lazy_orbax._orbax.symbols import future
from lazy_orbax.errors import SaveError
from lazy_orbax.pods.agreement import Agreement
from lazy_orbax.recovery import cleaning
from lazy_orbax.recovery.attempt import Attempt, Fate, Part, arrive
from lazy_orbax.save.pipeline import Save
from lazy_orbax.storage.save_error import save_error

# Where Orbax sets no timeout: what it takes by default.
_TIMEOUT_S = 1200
# How long an item may take to stop whose step has failed, unless its storage hangs.
_STOP_S = 10


class Commit:
    """What Orbax waits for: `Save.write`, in a thread that starts when the directory exists.

    With several processes it then waits until each of them has written, and merges what they
    wrote while all can still be told that this failed.

    Attributes:
        save: what is written.
        part: what becomes of it.
        others: futures of what Orbax's own type handlers write of the item.
    """

    def __init__(
        self,
        save: Save,
        directory: Any,
        custom_metadata: Any,
        *,
        attempt: Attempt,
        agreement: Agreement | None,
        merge: Callable[[Any], None],
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
        self.save, self.part = save, Part(save.recorder, self)
        self.others: Sequence[Any] = ()
        self._agreement, self._merge = agreement, merge
        # Whether somebody was told of the failure, who is not told again.
        self._is_reported = False
        attempt.join(self.part)
        self._coroutine = self._write(directory, custom_metadata)
        self._future = future.CommitFutureAwaitingContractedSignals(
            self._coroutine, name="lazy_orbax-write"
        )

    async def _write(self, directory: Any, custom_metadata: Any) -> None:
        """Writes the item, once its directory exists. In a thread of Orbax's."""
        if self._is_reported:  # There will be no directory.
            return
        created = await handed_in.created(directory)
        try:
            if arrive(self.part, str(created)):
                try:
                    self.save.write(str(created), custom_metadata)
                finally:
                    # Even if it failed: from here on this thread touches the directory no more.
                    self.part.move(Fate.WRITTEN)
            if self.save.failure is not None:
                self.part.move(Fate.FAILED)
                raise self.save.failure
        except SaveError:
            if not self._is_reported:
                raise

    def result(self, timeout: float | None = None) -> None:
        """Waits until the item is durable, on every process that writes it.

        Raises:
            SaveError: it failed, here or on another process.
            TimeoutError: it takes longer than `timeout` seconds, or the directory never came.
        """
        deadline_s = time.monotonic() + (_TIMEOUT_S if timeout is None else timeout)
        self.part.waiter = lifecycle.publisher()
        try:
            self._future.result(timeout=timeout)
            for other in self.others:
                other.result(timeout=None if timeout is None else deadline_s - time.monotonic())
            if self.save.failure is not None:
                raise self.save.failure
        except BaseException as error:
            gave_up = timeout is None or not isinstance(error, TimeoutError) or self.save.is_over
            if gave_up or self._agreement is not None:
                # Orbax may have given up before `Save.write` ran, which would have cleaned up.
                self._abandon(error)
                self._report()
                cleaning.clean_up(self.part, self.save.failure)
            raise
        failure = self._settle(deadline_s - time.monotonic())
        self._report()  # Orbax hears of it now, so `close` need not say it again.
        if failure is not None:
            self.part.recorder.end(error=failure)
            cleaning.clean_up(self.part, failure)
            raise failure

    def _settle(self, timeout_s: float) -> SaveError | None:
        """Waits for the other processes. Returns what failed, on any of them."""
        if self._agreement is None:
            return None
        failure = None if self._agreement.shares_directory else self._merged()
        finish = self._merged if self._agreement.shares_directory else None
        return self._agreement.settle(failure, finish, timeout_s)

    def _merged(self) -> SaveError | None:
        try:
            self._merge(self.part.directory)
        except Exception as error:  # noqa: BLE001 - It is raised on every process.
            return self._failure(error)
        self.part.move(Fate.MERGED)
        return None

    def _failure(self, error: BaseException) -> SaveError:
        failure = save_error(self.save.path, error)
        failure.__cause__ = error
        return failure

    def _report(self) -> None:
        self._is_reported = True
        self.save.forget()

    def outcome(self) -> BaseException | None:
        """Waits for the end and returns what went wrong, if nobody was told yet."""
        try:
            if cleaning.is_given_up(self.part, threading.current_thread()):
                cleaning.forgo(self.part)
            if not self._is_reported and self._agreement is not None:
                # Nobody here waited for it, so perhaps nobody elsewhere does.
                self._abandon(SaveError("Orbax gave this save up"))
            elif not self._is_reported:
                self.result()
        except Exception as error:  # noqa: BLE001 - `close` raises it.
            return error
        finally:
            if cleaning.is_given_up(self.part, None):
                cleaning.remove_leftovers(self.part)
            self.part.recorder.end()
        return None

    def cancel(self) -> None:
        """Stops writing and returns the host memory."""
        for running in (self._future, *self.others):
            running.cancel()
        self._abandon(concurrent.futures.CancelledError("The save was cancelled."))

    def lose(self, error: BaseException) -> bool:
        """Ends the save whose snapshot has failed.

        Returns:
            Whether `save()` must go on nevertheless: the other processes are in the middle of it,
            and are told of the failure by `result`. Else nobody is told but the caller.
        """
        if self._agreement is not None and isinstance(error, Exception):
            # Not reported: `result` tells the others first, and raises what failed here as well.
            self._end(error)
            self.save.forget()
            return True
        # Reported before it ends: who waits for it must not be told again of what `save()` raises.
        self._report()
        self._end(error)
        for other in self.others:
            other.cancel()
        cleaning.refuse(self.part.attempt, self.save.failure or self._failure(error))
        return False

    # What `cleaning` asks of it.

    def stop(self, failure: SaveError | None) -> None:
        """Ends the save of an item whose step has failed, and waits until it writes no more."""
        if failure is not None and not self._is_reported:
            self._fail(SaveError(f"another item of the step failed: {failure.what}"))
            self._report()
        if self.part.fate is Fate.WRITING:
            with contextlib.suppress(Exception):
                self._future.result(timeout=_STOP_S)

    def forgo(self, failure: SaveError, *, may_run: bool) -> None:
        """Ends a save that has no directory; `may_run`: Orbax's thread may still come to it."""
        self._fail(failure)
        self._report()
        if not may_run:
            self._never_run()

    def is_alone(self) -> bool:
        """Whether no other process can be writing in the item's directory any more."""
        agreement = self._agreement
        return agreement is None or not agreement.shares_directory or agreement.all_told()

    def own_directories(self) -> Sequence[str]:
        """Names of the directories in the item's that only this process writes to."""
        return self.save.own_directories

    # The ways in which a save ends early.

    def _end(self, error: BaseException) -> None:
        self.save.fail(error)
        # Where it is being written, the thread that writes drops what is held.
        if self.part.move(Fate.FAILED):
            self.save.drop()

    def _fail(self, error: BaseException) -> None:
        # What is held here is dropped before the other processes are told.
        self._end(error)
        if self._agreement is not None and not self._is_reported:
            self._agreement.settle(self.save.failure or self._failure(error), None, 0)

    def _abandon(self, error: BaseException) -> None:
        self._fail(error)
        self._never_run()

    def _never_run(self) -> None:
        # Where Orbax's thread will not run it any more, Python would complain of that.
        if inspect.getcoroutinestate(self._coroutine) == inspect.CORO_CREATED:
            self._coroutine.close()
