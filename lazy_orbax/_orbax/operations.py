"""Several threads of a process may save at once: each save has a number of its own."""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
from collections.abc import Coroutine
from typing import Any

from lazy_orbax._orbax.symbols import SRC, ocp, probe

_DONE = "lazy_orbax_tells_threads_apart"
# Of a coroutine that a thread waits for, wherever it runs: that thread's.
_ASKED_BY: contextvars.ContextVar[_Save | None] = contextvars.ContextVar(
    "lazy_orbax_asked_by", default=None
)


class _Save:
    """The save that a thread began last."""

    operation: int | None = None


class _OfThread(threading.local):
    """What each thread has of its own."""

    def __init__(self):
        self.save = _Save()


_OWN = _OfThread()


def tell_threads_apart() -> None:
    """Lets several threads of this process begin saves at once. A second call does nothing.

    Orbax keeps one number for the save that is beginning, by which its parts find each other. A
    thread that begins a save in the middle of another's takes the number from them: they wait for
    the directories of the wrong save, or for none. After this, a thread that began a save finds
    the number of its own save. Others find the last one, as before.

    Where an event loop runs, as in a notebook, Orbax runs coroutines in threads that it makes for
    that. They count as the thread that waits for them.
    """
    ids = SRC.get("operation_ids")
    names = ("next_operation_id", "get_current_operation_id")
    if hasattr(ids, _DONE) or not all(hasattr(ids, name) for name in names):
        return
    next_of_process, last_of_process = (getattr(ids, name) for name in names)
    lock = threading.Lock()

    def begin(_: type) -> int:
        mine = _mine()
        with lock:
            mine.operation = operation = next_of_process()
        return operation

    def current(_: type) -> str:
        operation = _mine().operation
        return last_of_process() if operation is None else str(operation)

    for name, method in zip(names, (begin, current), strict=True):
        setattr(ids, name, classmethod(method))
    setattr(ids, _DONE, True)
    found, _ = probe(ocp.__name__, {"run_sync": ("asyncio_utils", "run_sync")})
    for name, stock in found.items():
        setattr(sys.modules[stock.__module__], name, _in_the_name_of_this_thread(stock))


def _mine() -> _Save:
    return _ASKED_BY.get() or _OWN.save


def _in_the_name_of_this_thread(run: Any) -> Any:
    """Returns what waits for a coroutine, which then counts as the thread that waits."""

    @functools.wraps(run)
    def run_sync(coroutine: Coroutine[Any, Any, Any]) -> Any:
        token = _ASKED_BY.set(_mine())
        try:
            return run(coroutine)
        finally:
            _ASKED_BY.reset(token)

    return run_sync
