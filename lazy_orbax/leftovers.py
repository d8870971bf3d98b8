"""What a failed save leaves on a local disk, and its removal.

Stock Orbax leaves it until the process ends: on a full disk every later save fails for it. Removed
is only what carries Orbax's mark of what is temporary, and only once nobody writes there any more.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from lazy_orbax import _orbax, file_names
from lazy_orbax.errors import MAIN_THREAD_ENDED, SaveError

# Orbax writes the metadata of a step from a thread of its own.
_STEP_METADATA_S = 0.5
_TRIES = 3
# How long a save that is refused waits for Orbax to create its directories.
_DIRECTORIES_S = 5
_log = logging.getLogger("lazy_orbax")


class Attempt:
    """One attempt of Orbax to save a step, as far as this process takes part in it.

    Invariant, under the lock: every commit in `commits` joined before the attempt failed.

    Attributes:
        root: the step's temporary directory; empty where it has none, as in an object store.
        removes_all: whether this process removes what others wrote of a failed step as well.
        commits: of its items, in the order of their saves.
        failure: why there will be no such step, once that is known.
    """

    def __init__(self, root: str, operation: str, *, removes_all: bool):
        self.root, self._operation, self.removes_all = root, operation, removes_all
        self.commits: list[Any] = []
        self.failure: SaveError | None = None
        self._lock = threading.Lock()

    def join(self, commit: Any) -> None:
        """Adds the commit of an item.

        Raises:
            SaveError: the step has failed already.
        """
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self.commits.append(commit)

    def fail(self, failure: SaveError) -> None:
        """Notes that there will be no such step. No more commits may join."""
        with self._lock:
            self.failure = self.failure or failure

    def is_of(self, operation: str) -> bool:
        """Whether it belongs to this operation of Orbax."""
        return self._operation == operation

    @property
    def is_last(self) -> bool:
        """Whether no later attempt of this process took over its directory."""
        return bool(self.root) and _ATTEMPTS.get(self.root) is self

    @property
    def is_there(self) -> bool:
        """Whether the temporary directory is there, and no later attempt has it."""
        return self.is_last and os.path.lexists(self.root)

    def remove(self, items: Iterable[str], own: Sequence[str] | None = None) -> bool:
        """Removes what was written. Nobody may write there any more.

        Args:
            items: directories of items in `root`.
            own: where other processes write as well: the names in them that this one wrote.

        Returns:
            Whether nothing of it is left.
        """
        if not self.is_last:
            return True
        if own is not None:
            return _remove(os.path.join(item, name) for item in items for name in own)
        inside = [item for item in items if item != self.root]
        if inside and not _holds_a_step(self.root):
            return _remove(inside) and _remove_empty(self.root)
        return _remove([self.root])


_LOCK = threading.Lock()
# By `root`. An attempt lives as long as a commit of it.
_ATTEMPTS: weakref.WeakValueDictionary[str, Attempt] = weakref.WeakValueDictionary()


def attempt_at(directory: str, operation: str, *, removes_all: bool) -> Attempt:
    """Returns the attempt that an item is saved in.

    Args:
        directory: the item's directory, as it is while the step is not published.
        operation: Orbax's name of the attempt.
        removes_all: whether this process removes what others wrote as well.
    """
    root = temporary_root(directory)
    with _LOCK:
        attempt = _ATTEMPTS.get(root) if root else None
        if attempt is None or not attempt.is_of(operation):
            attempt = Attempt(root, operation, removes_all=removes_all)
            if root:
                _ATTEMPTS[root] = attempt
        return attempt


def clean_up(directory: str) -> None:
    """Removes what failed saves left below a directory, once Orbax has ended with them.

    Args:
        directory: of a checkpoint manager that has no save in progress.
    """
    with _LOCK:
        here = [a for root, a in _ATTEMPTS.items() if os.path.dirname(root) == directory]
    for attempt in here:
        for commit in list(attempt.commits):
            commit.clean_up()


def promised_directories(operation: str) -> list[str]:
    """Returns the signals of directories that Orbax has begun to create and that do not exist yet.

    Args:
        operation: Orbax's name of the attempt.
    """
    store, here = _orbax.key_value_store(), f"awaitable_signals_contract_{operation}"
    promised = store.key_value_try_get(f"{here}/awaitable_signals_contract") or ""
    signals = [f"{here}/{name}" for name in promised.split(",") if name]
    return [signal for signal in signals if store.key_value_try_get(signal) is None]


def release_waiting(operation: str) -> bool:
    """Ends the threads, Orbax's too, that wait for directories which will never exist.

    They would wait for twenty minutes, and the interpreter would not end before.

    Returns:
        Whether it did. Of several processes one cannot know what the others wait for.
    """
    if jax.process_count() > 1:
        return False
    for signal in promised_directories(operation):
        _orbax.key_value_store().key_value_set(signal, "given up", allow_overwrite=True)
    return True


def leaving_nobody_waiting(async_save: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an `async_save` that leaves no thread of Orbax waiting where it refuses to save.

    Orbax is still creating the directories then. If the process, or the manager, ends in the middle
    of that, the threads that wait for them keep the process alive until they time out.
    """

    @functools.wraps(async_save)
    async def wrapped(*args: Any, **keywords: Any) -> Any:
        if _orbax.MISSING:
            return await async_save(*args, **keywords)
        operation = _orbax.operation_id()
        if not threading.main_thread().is_alive():  # Python lets Orbax create no directory then.
            release_waiting(operation)
            raise SaveError(MAIN_THREAD_ENDED)
        try:
            return await async_save(*args, **keywords)
        except BaseException:
            # Not in this thread: its event loop may be what creates them.
            await asyncio.to_thread(_await_directories, operation)
            raise

    return wrapped


def _await_directories(operation: str) -> None:
    deadline_s = time.monotonic() + _DIRECTORIES_S
    while promised_directories(operation) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    release_waiting(operation)


def temporary_root(directory: str) -> str:
    """Returns the temporary directory of the step that an item belongs to, or an empty string."""
    if not os.path.isabs(directory):
        return ""
    parent, name = os.path.split(directory.rstrip("/"))
    if file_names.TEMPORARY in os.path.basename(parent):
        return parent
    return directory.rstrip("/") if file_names.TEMPORARY in name else ""


def _holds_a_step(root: str) -> bool:
    """Whether Orbax made the directory for a step. It may take it a moment to say so."""
    deadline_s = time.monotonic() + _STEP_METADATA_S
    file = os.path.join(root, file_names.STEP_METADATA)
    while os.path.isdir(root) and not os.path.lexists(file):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def _remove_empty(path: str) -> bool:
    try:
        os.rmdir(path)
    except OSError:
        return not os.path.lexists(path)
    return True


def _remove(paths: Iterable[str]) -> bool:
    """Removes as many directories as can be. Returns whether all are gone."""
    gone = [_remove_tree(path) for path in paths]
    return all(gone)


def _remove_tree(path: str) -> bool:
    """Removes a directory, but nothing that a link in it leads to. Returns whether it is gone."""
    problems: list[OSError] = []
    for _ in range(_TRIES):
        problems.clear()
        shutil.rmtree(path, onerror=lambda *told: problems.append(told[2][1]))
        if not os.path.lexists(path):
            return True
        if any(problem.errno not in (errno.ENOENT, errno.ENOTEMPTY) for problem in problems):
            break
    _log.warning("What a failed save left in %s could not be removed: %s", path, problems[:1])
    return False
