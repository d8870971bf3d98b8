"""The moment after which Python lets Orbax do nothing more in the background."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - What it registers must be there before ours.
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from lazy_orbax._orbax.lifecycle import COMMIT_THREAD, MANAGER_THREAD

# These start no thread once the main thread has ended: https://github.com/python/cpython/pull/117029
_REFUSES_THREADS = (3, 12) <= sys.version_info < (3, 12, 3)
# Tools of `sys.monitoring` that no kind of program is known to take.
_FREE_TOOLS = (3, 4)


def call_before(call: Callable[[], None]) -> None:
    """Calls `call` when the main thread has ended, while executors take work yet.

    Orbax creates directories and writes its metadata in executors. Where Python has no such moment
    `call` is not called; nor is it where the moment has passed. It may be called twice, unless
    Ctrl-C ended the first call.
    """
    if _REFUSES_THREADS and not (hasattr(sys, "ps1") or sys.flags.interactive):
        call = _called_when_the_program_returns(call)
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):
            register(call)


def _called_when_the_program_returns(call: Callable[[], None]) -> Callable[[], None]:
    """Calls `call` when the outermost frame of the main thread returns, or raises.

    Returns:
        What may be called later, for want of such a moment.
    """
    monitoring: Any = getattr(sys, "monitoring")  # noqa: B009 - Not of every Python.
    main = threading.main_thread()
    frame = sys._current_frames().get(main.ident or 0)
    tool = next((tool for tool in _FREE_TOOLS if monitoring.get_tool(tool) is None), None)
    if frame is None or tool is None:
        return call
    while frame.f_back is not None:
        frame = frame.f_back
    program, events, gave_up = frame.f_code, monitoring.events, list[KeyboardInterrupt]()

    def call_unless_given_up() -> None:
        try:
            if gave_up:
                raise gave_up[0]
            call()
        except KeyboardInterrupt as interrupt:
            gave_up.append(interrupt)
            raise

    def end(code: Any, *_: Any) -> None:
        if code is program and threading.current_thread() is main:
            monitoring.set_local_events(tool, program, 0)
            monitoring.set_events(tool, 0)
            call_unless_given_up()

    monitoring.use_tool_id(tool, "lazy_orbax")
    for event in (events.PY_RETURN, events.PY_UNWIND):
        monitoring.register_callback(tool, event, end)
    monitoring.set_local_events(tool, program, events.PY_RETURN)
    monitoring.set_events(tool, events.PY_UNWIND)  # There is none of one function alone.
    return call_unless_given_up


def running_saves() -> list[threading.Thread]:
    """Returns the threads in which Orbax is about to publish a step, or waits for that."""
    names = (COMMIT_THREAD, MANAGER_THREAD)
    return [thread for thread in threading.enumerate() if thread.name in names]
