"""The moment after which Python lets Orbax do nothing more in the background."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - What it registers must be there before ours.
import contextlib
import threading
from collections.abc import Callable

from lazy_orbax._orbax.lifecycle import COMMIT_THREAD, MANAGER_THREAD


def call_before(call: Callable[[], None]) -> None:
    """Calls `call` when the main thread has ended, while executors take work yet.

    Orbax creates directories and writes its metadata in executors. Where Python has no such moment
    `call` is not called; nor is it where the moment has passed.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):
            register(call)


def running_saves() -> list[threading.Thread]:
    """Returns the threads in which Orbax is about to publish a step, or waits for that."""
    names = (COMMIT_THREAD, MANAGER_THREAD)
    return [thread for thread in threading.enumerate() if thread.name in names]
