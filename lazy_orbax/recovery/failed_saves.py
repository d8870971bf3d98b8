"""Failed saves that are logged and counted, and not raised."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lazy_orbax.errors import OptionError, SaveError
from lazy_orbax.recovery import cleaning, retired_steps

# Orbax keeps several errors of one save, and tells one at a time.
_MOST_ERRORS = 20
_log = logging.getLogger("lazy_orbax")


class FailedSaves:
    """Counts the saves that failed.

    Invariant, under the lock: `count` failures were noted, and the latest is `last`.

    Attributes:
        count: how many saves failed.
        last: what the latest of them failed with, or `None`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last: Exception | None = None
        self._lock = threading.Lock()

    def note(self, errors: list[Exception]) -> None:
        """Notes one failed save, of which Orbax may have told several errors."""
        ours = [error for error in errors if isinstance(error, SaveError)]
        with self._lock:
            self.count, self.last = self.count + 1, (ours or errors)[0]
        for error in errors:
            _log.error("A save failed, and training goes on: %s", error, exc_info=error)
            _forget_frames(error)


def _forget_frames(error: BaseException | None) -> None:
    """Drops the frames of an error that is kept: they hold the state that was to be saved."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def log_failed_saves(checkpointer: Any) -> FailedSaves:
    """Makes a checkpointer log and count failed saves instead of raising them.

    Its `save`, `wait_until_finished`, `check_for_errors` and `close` then no longer raise what a
    save failed with; `save` returns `False` if it fails at once. Orbax reports some failures a
    second time, in the next `save`; that save is then begun again. A mistake of the caller, such as
    a tree that cannot be saved, is raised as before. After a failure the manager reads its list of
    steps again, because Orbax forgets the steps that the failed one would have replaced.

    Args:
        checkpointer: an `ocp.CheckpointManager`, `ocp.AsyncCheckpointer` or `ocp.Checkpointer`,
            whose methods are replaced, on this object only.

    Returns:
        The count.

    Raises:
        OptionError: the object has no `save` method.
    """
    if not callable(getattr(checkpointer, "save", None)):
        raise OptionError(f"{checkpointer!r} has no save().")
    failed, check = FailedSaves(), getattr(checkpointer, "check_for_errors", None)

    def note(errors: list[Exception]) -> None:
        """Notes a failed save, and leaves nothing of it to be told later."""
        cleaning.end_below(str(getattr(checkpointer, "directory", "")))
        told = -1
        while check is not None and told < len(errors) < _MOST_ERRORS:
            told = len(errors)
            with _collecting(errors):
                check()
        failed.note(errors)
        if hasattr(checkpointer, "reload"):
            with _collecting([]):
                checkpointer.reload()

    for name in ("wait_until_finished", "check_for_errors"):
        if hasattr(checkpointer, name):
            setattr(checkpointer, name, _wait_without_raising(getattr(checkpointer, name), note))
    checkpointer.save = _save_without_raising(checkpointer.save, note)
    checkpointer.close = _close_without_raising(checkpointer, note)
    retired_steps.register(checkpointer)
    return failed


_Note = Callable[[list[Exception]], None]


def _wait_without_raising(wait: Callable[[], None], note: _Note) -> Callable[[], None]:
    @functools.wraps(wait)
    def without_raising() -> None:
        errors: list[Exception] = []
        with _collecting(errors):
            wait()
        if errors:
            note(errors)

    return without_raising


def _save_without_raising(save: Callable[..., Any], note: _Note) -> Callable[..., Any]:
    @functools.wraps(save)
    def without_raising(*args: Any, **kwargs: Any) -> Any:
        errors: list[Exception] = []
        while len(errors) < 2:
            try:
                return save(*args, **kwargs)
            except (SaveError, OSError) as error:
                errors.append(error)
                step = args[0] if args else kwargs.get("step")
                if not isinstance(step, int) or getattr(error, "step", None) == step:
                    break
                what = "Saving step %d again: what failed may be an earlier one: %s"
                _log.warning(what, step, error, exc_info=error)  # Nobody else may tell.
                _forget_frames(error)
        note(errors)
        return False

    return without_raising


def _close_without_raising(checkpointer: Any, note: _Note) -> Callable[[], None]:
    close = checkpointer.close

    @functools.wraps(close)
    def without_raising() -> None:
        try:
            close()
        except SaveError as error:
            note([error])
            close()  # What was not closed yet.
        retired_steps.unregister(checkpointer)

    return without_raising


@contextlib.contextmanager
def _collecting(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - It is logged.
        errors.append(error)
