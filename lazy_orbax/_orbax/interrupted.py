"""Threads that run on though Python says that they have ended."""

from __future__ import annotations

import logging
import threading
import time

from lazy_orbax._orbax.lifecycle import COMMIT_THREAD
from lazy_orbax._orbax.process_end import running_saves

_LOOK_S = 0.02
_log = logging.getLogger("lazy_orbax")


def await_interrupted() -> bool:
    """Waits for the saves of Orbax whose end somebody waited for and was interrupted.

    Up to Python 3.12, Ctrl-C while a thread is waited for marks that thread as ended. Orbax takes
    its save for over then, and would begin the next one in the middle of it.

    Returns:
        Whether a step was being published.
    """
    published = any(thread.name == COMMIT_THREAD for thread in _interrupted())
    if running := _interrupted():
        _log.warning(
            "A save is still being written although the wait for it was interrupted (Ctrl-C); "
            "waiting until it has ended. Interrupt again to give up."
        )
    while running:
        time.sleep(_LOOK_S)
        running = _interrupted()
    return published


def _interrupted() -> list[threading.Thread]:
    ended = [thread for thread in running_saves() if _is_said_to_have_ended(thread)]
    # One that did end just now is not listed any more.
    return [thread for thread in ended if thread in running_saves()]


def _is_said_to_have_ended(thread: threading.Thread) -> bool:
    if thread.is_alive():
        return False
    try:
        thread.join(0)
    except RuntimeError:  # It is only about to start, in a thread beside this one.
        return False
    return True
