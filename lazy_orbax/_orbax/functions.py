"""The saves of v1's functions, such as `save_async`: which of them run, and who hears of the end.

Each has a thread of its own, without a name, in which it waits for the items and publishes the
step.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable

OnEnd = Callable[[BaseException | None], None]


class Functions:
    """The saves of v1's functions.

    Invariant, under the lock: an operation is in `_beginning` from the moment in which an item of
    it was saved, until its thread runs, or the thread that began it begins another; and then in
    `_running` until it has ended. What is to be called then is in `_on_end` in both.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._beginning: dict[int, str] = {}
        self._running: set[str] = set()
        self._on_end: dict[str, list[OnEnd]] = {}

    def begin(self, operation: str, on_end: OnEnd) -> None:
        """Notes that an item is saved. `on_end` is called with the error, or `None`."""
        with self._changed:
            before = self._beginning.get(threading.get_ident())
            if before not in (None, operation):  # Orbax gave that one up.
                self._on_end.pop(before, None)
            self._beginning[threading.get_ident()] = operation
            self._on_end.setdefault(operation, []).append(on_end)

    def run(self, operation: str) -> bool:
        """Notes that the thread of an operation runs. Returns whether an item of it is ours."""
        with self._changed:
            if operation not in self._on_end:
                return False
            self._beginning = {k: v for k, v in self._beginning.items() if v != operation}
            self._running.add(operation)
            return True

    def end(self, operation: str, error: BaseException | None) -> None:
        """Tells of the end of an operation, and notes it."""
        try:
            for on_end in self._on_end.get(operation, ()):
                on_end(error)
        finally:
            with self._changed:
                self._on_end.pop(operation, None)
                self._running.discard(operation)
                self._changed.notify_all()

    def is_going_on(self, operation: str) -> bool:
        """Whether Orbax is in the middle of it."""
        with self._changed:
            return operation in self._running or operation in self._beginning.values()

    def await_all(self) -> None:
        """Waits until no operation runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    @property
    def has_running(self) -> bool:
        """Whether an operation runs."""
        return bool(self._running)


FUNCTIONS = Functions()
"""Of this process: v1's functions belong to no handler."""
begin, is_going_on = FUNCTIONS.begin, FUNCTIONS.is_going_on


def watched(operation: str, running: Awaitable[None]) -> Awaitable[None]:
    """Returns what runs an operation of Orbax to its end, and tells of that."""
    return _watched(operation, running) if FUNCTIONS.run(operation) else running


async def _watched(operation: str, running: Awaitable[None]) -> None:
    try:
        await running
    except BaseException as error:
        FUNCTIONS.end(operation, error)
        raise
    FUNCTIONS.end(operation, None)
