"""Daemon threads for whatever may hang on a storage that does not answer.

Nobody has to wait for them: neither `close()` nor the end of the process, as for the threads of an
executor. One that has nothing to do waits a moment for more, because a save asks for several, one
after the other, and then ends.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

from lazy_orbax._machine import priority_of_this_thread

_IDLE_S = 1.0
_IDLE_NAME = "lazy_orbax-idle"


def run(work: Callable[[], Any], name: str) -> concurrent.futures.Future[Any]:
    """Runs `work` at once, in a thread that has this name meanwhile. Returns its outcome."""
    return _POOL.run(work, name)


def await_progress(
    futures: Iterable[Any],
    *,
    timeout_s: float,
    what: str,
    goes_on: Callable[[], bool] = lambda: False,
) -> None:
    """Waits for futures, of Python or of TensorStore, for as long as there is progress.

    Progress is a future that ends, well or not; else `goes_on` is asked.

    Args:
        futures: what to wait for.
        timeout_s: most seconds without progress.
        what: what did not happen, for the message.
        goes_on: whether there was other progress since it was asked.

    Raises:
        TimeoutError: there was none.
    """
    for future in futures:
        while not future.done():
            with contextlib.suppress(Exception):  # It is told of by who asks for the result.
                future.exception(timeout=timeout_s)
            if not (future.done() or goes_on()):
                raise TimeoutError(
                    errno.ETIMEDOUT, f"{what} for {timeout_s:g} s (LazyOptions.storage_timeout_s)"
                )


def dismiss_idle() -> None:
    """Ends the threads that have nothing to do, and waits for that."""
    _POOL.dismiss_idle()


class _Thread:
    """A thread of the pool, and what it was given to do; `None` is to end."""

    def __init__(self, pool: _Pool, priority: int):
        self.given: queue.SimpleQueue[tuple[Any, Any, str] | None] = queue.SimpleQueue()
        self._pool, self._priority = pool, priority
        self._thread = threading.Thread(target=self._run, name=_IDLE_NAME, daemon=True)
        self._thread.start()

    def dismiss(self) -> None:
        """Ends the thread, which has nothing to do."""
        self.given.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                given = self.given.get(timeout=_IDLE_S)
            except queue.Empty:
                if self._pool.let_go(self, self._priority):
                    return
                continue
            if given is None:
                return
            future, work, name = given
            self._thread.name = name
            tell = _outcome_of(work)
            self._thread.name = _IDLE_NAME
            # Before anybody hears of the end: who then has more to do takes this thread for it.
            self._pool.take_back(self, self._priority)
            tell(future)
            del given, future, work, tell


def _outcome_of(work: Callable[[], Any]) -> Callable[[concurrent.futures.Future[Any]], None]:
    """Runs `work`. Returns what tells a future how that went."""
    try:
        value = work()
    except BaseException as error:  # noqa: BLE001 - Whoever waits raises it.
        raised = error
        return lambda future: future.set_exception(raised)
    return lambda future: future.set_result(value)


class _Pool:
    """The threads of this process that have nothing to do.

    They are kept by their scheduling priority, which a thread has from the one that started it.

    Invariant, under the lock: a thread is in `_idle` from before its work is said to have ended
    until it is given other work or ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[int, list[_Thread]] = collections.defaultdict(list)

    def run(self, work: Callable[[], Any], name: str) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        priority = priority_of_this_thread()
        with self._lock:
            idle = self._idle[priority]
            thread = idle.pop() if idle else _Thread(self, priority)
            thread.given.put((future, work, name))  # Under the lock: else it might end just now.
        return future

    def dismiss_idle(self) -> None:
        """Ends every thread that has nothing to do."""
        with self._lock:
            idle = [thread for threads in self._idle.values() for thread in threads]
            self._idle.clear()
        for thread in idle:
            thread.dismiss()

    def take_back(self, thread: _Thread, priority: int) -> None:
        """Notes that a thread has ended its work."""
        with self._lock:
            self._idle[priority].append(thread)

    def let_go(self, thread: _Thread, priority: int) -> bool:
        """Returns whether a thread that waited for a while may end."""
        with self._lock:
            if not thread.given.empty():
                return False
            with contextlib.suppress(ValueError):
                self._idle[priority].remove(thread)
            return True


_POOL = _Pool()
if hasattr(os, "register_at_fork"):  # A child has none of these threads, and its lock may be held.
    os.register_at_fork(after_in_child=_POOL.__init__)


class Crew:
    """Some threads of the pool for work that comes in many parts.

    Invariant, under the lock: `_at_work` threads take from `_waiting` until it is empty; `_load` is
    what all that waits and is worked on weighs; once the crew is closed nothing is added.
    """

    def __init__(self, name: str, most: int):
        """Starts no thread yet.

        Args:
            name: of its threads, while they work.
            most: most threads at once.
        """
        self._name, self._most = name, most
        self._waiting: collections.deque[tuple[Any, Callable[[], Any], float]] = collections.deque()
        self._changed = threading.Condition()
        self._at_work, self._load = 0, 0.0
        self._is_closed = False

    def submit(
        self, work: Callable[..., Any], *args: Any, weight: float = 1.0
    ) -> concurrent.futures.Future[Any]:
        """Runs `work(*args)` when a thread is free. Work itself may submit more.

        Args:
            work: what to run.
            *args: its arguments.
            weight: how much of a thread it deserves.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._changed:
            if self._is_closed:
                future.cancel()
                return future
            if self._at_work < min(self._most, math.ceil(self._load + weight)):
                # Before it is noted: where the system has no more threads, this raises. It waits
                # for the lock that is held here.
                self._begin_to_work()
            self._waiting.append((future, lambda: work(*args), weight))
            self._load += weight
        return future

    def _begin_to_work(self) -> None:
        try:
            run(self._work_off, self._name)
        except RuntimeError:
            if not self._at_work:  # Else those that are there do it.
                raise
            return
        self._at_work += 1

    def _work_off(self) -> None:
        weight = 0.0
        while True:
            with self._changed:
                self._load -= weight
                if not self._waiting:
                    self._at_work -= 1
                    self._changed.notify_all()
                    return
                future, work, weight = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                _outcome_of(work)(future)
            del future, work

    def close(self, timeout_s: float | None) -> None:
        """Cancels what has not begun, and waits for what has; `None`: for as long as it takes."""
        with self._changed:
            self._is_closed = True
            for future, _, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._changed.wait_for(lambda: self._at_work == 0, timeout_s)
