"""One attempt of Orbax to save a step, as far as this process takes part in it."""

from __future__ import annotations

import enum
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

from lazy_orbax import _paths
from lazy_orbax.errors import SaveError
from lazy_orbax.recovery import leftovers
from lazy_orbax.timeline import Recorder


class Fate(enum.Enum):
    """What becomes of an item, and who may touch its directory until then."""

    PROMISED = "Orbax has promised the directory; nothing of ours is there"
    WRITING = "a thread writes there, perhaps only to end with an error"
    WRITTEN = "that thread has ended"
    MERGED = "what all processes wrote is one item"
    PUBLISHED = "Orbax has published the step"
    FORGONE = "the save failed without a directory, which Orbax may create yet"
    FAILED = "there will be no such step, and no thread of ours writes there"
    CLEAN = "there is no such step, and nothing of it is left"


_NEXT = {
    Fate.PROMISED: (Fate.WRITING, Fate.FAILED),
    Fate.WRITING: (Fate.WRITTEN,),
    Fate.WRITTEN: (Fate.MERGED, Fate.PUBLISHED, Fate.FAILED),
    Fate.MERGED: (Fate.PUBLISHED, Fate.FAILED),
    Fate.FORGONE: (Fate.FAILED,),
    Fate.FAILED: (Fate.FORGONE, Fate.CLEAN),
    Fate.PUBLISHED: (),
    Fate.CLEAN: (),
}


class Writing(Protocol):
    """The save of an item, as far as its end is concerned. `Commit` is one."""

    def stop(self, failure: SaveError | None) -> None:
        """Ends the save with `failure`, and waits for a while until it writes no more."""

    def forgo(self, failure: SaveError, *, may_run: bool) -> None:
        """Ends a save that has no directory; `may_run`: Orbax's thread may still come to it."""

    def is_alone(self) -> bool:
        """Whether no other process can be writing in the item's directory any more."""
        ...

    def own_directories(self) -> Sequence[str]:
        """Names of the directories in the item's that only this process writes to."""
        ...


class Part:
    """An item of an attempt.

    Invariant, under the lock: the fate changes only as `_NEXT` says. So where two threads want to
    move it on from one fate, one of them does, and knows it.

    Attributes:
        recorder: where its save goes, and why it failed.
        writing: its save.
        attempt: the `Attempt` that it has joined.
        directory: where it is written; empty until that exists.
        waiter: the thread that waited for it on Orbax's behalf, once one did.
    """

    def __init__(self, recorder: Recorder, writing: Writing):
        self.recorder, self.writing = recorder, writing
        self.attempt: Attempt
        self.directory = ""
        self.waiter: threading.Thread | None = None
        self._lock = threading.Lock()
        self._fate = Fate.PROMISED

    @property
    def fate(self) -> Fate:
        """What has become of it so far."""
        return self._fate

    def move(self, fate: Fate) -> bool:
        """Moves the fate on. Returns whether it was this call that did."""
        with self._lock:
            # Of two threads that want this, one finds the old fate here, and the other does not.
            may = fate in _NEXT[self._fate]
            self._fate = fate if may else self._fate
            return may

    @property
    def failure(self) -> BaseException | None:
        """Why there is no such step, as far as is known."""
        return self.recorder.timeline.error

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it, and all is said."""
        return self.recorder.is_complete and self._fate in (Fate.PUBLISHED, Fate.CLEAN)


class Attempt:
    """One attempt of Orbax to save a step.

    Invariant, under the lock: every part in `parts` joined before the attempt was refused.

    Attributes:
        root: the step's temporary directory; empty where it has none, as in an object store.
        operation: Orbax's name of the attempt.
        removes_all: whether this process removes what others wrote of a failed step as well.
        parts: its items, in the order of their saves.
    """

    def __init__(self, root: str, operation: str, *, removes_all: bool):
        self.root, self.operation, self.removes_all = root, operation, removes_all
        self.parts: list[Part] = []
        self._refused: SaveError | None = None
        self._lock = threading.Lock()

    def join(self, part: Part) -> None:
        """Adds an item.

        Raises:
            SaveError: the step has failed already.
        """
        with self._lock:
            if self._refused is not None:
                raise self._refused
            self.parts.append(part)
            part.attempt = self

    def refuse(self, failure: SaveError) -> None:
        """Notes that `save()` raises `failure`. No more items may join."""
        with self._lock:
            # The first reason stays. Whoever has not joined yet is told it.
            self._refused = self._refused or failure

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
            return leftovers.remove(os.path.join(item, name) for item in items for name in own)
        # In a directory that is not of a step alone, the items of others stay.
        inside = [item for item in items if item != self.root]
        if inside and not leftovers.holds_a_step(self.root):
            return leftovers.remove(inside) and leftovers.remove_if_empty(self.root)
        return leftovers.remove([self.root])


_LOCK = threading.Lock()
# By `root`. An attempt lives as long as a part of it.
_ATTEMPTS: weakref.WeakValueDictionary[str, Attempt] = weakref.WeakValueDictionary()


def attempt_at(directory: str, operation: str, *, removes_all: bool) -> Attempt:
    """Returns the attempt that an item is saved in.

    Args:
        directory: the item's directory, as it is while the step is not published.
        operation: Orbax's name of the attempt.
        removes_all: whether this process removes what others wrote as well.
    """
    root = _paths.temporary_root(directory)
    with _LOCK:
        attempt = _ATTEMPTS.get(root) if root else None
        if attempt is None or attempt.operation != operation:
            attempt = Attempt(root, operation, removes_all=removes_all)
            if root:
                _ATTEMPTS[root] = attempt
        return attempt


def arrive(part: Part, directory: str) -> bool:
    """Notes that an item's directory exists. Returns whether it is to be written now."""
    part.directory = directory
    if not part.attempt.root:  # It may have had no name before.
        removes_all, operation = part.attempt.removes_all, part.attempt.operation
        attempt_at(directory, operation, removes_all=removes_all).join(part)
    # Not where the save was ended meanwhile: what it held is dropped, and nothing is written.
    return part.move(Fate.WRITING)


def attempts_below(directory: str) -> list[Attempt]:
    """Returns the attempts at steps of a directory."""
    with _LOCK:
        return [a for root, a in _ATTEMPTS.items() if os.path.dirname(root) == directory]
