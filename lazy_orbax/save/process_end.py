"""The end of the main thread, with saves in flight.

Python ends all executors then, and only after that waits for threads. Orbax needs executors to
publish a step, so a save that nobody waited for would be lost: it is awaited here, before.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref

import jax

from lazy_orbax._members import members_of
from lazy_orbax._orbax import process_end
from lazy_orbax._orbax.functions import FUNCTIONS
from lazy_orbax.save.begin import Saver
from lazy_orbax.save.finish import end_all

_log = logging.getLogger("lazy_orbax")
# Whose saves are awaited. Known to Python once there is one.
_SAVERS: weakref.WeakSet[Saver] = weakref.WeakSet()
_lock = threading.Lock()
_is_known: list[bool] = []


def finish_at_the_end(saver: Saver) -> None:
    """Lets what a handler saves be finished although nobody waits for it."""
    with _lock:
        _SAVERS.add(saver)
        if not _is_known:
            _is_known.append(True)
            process_end.call_before(_finish)


def _finish() -> None:
    savers = [saver for saver in members_of(_SAVERS) if saver.has_unfinished]
    parts = [commit.part for saver in savers for commit in saver.commits]
    unknown = [part for part in parts if part.failure is None]
    running = process_end.running_saves() if savers else []
    if running or (savers and FUNCTIONS.has_running):
        _log.warning(
            "The main thread has ended while a save was in flight; it is finished first (Ctrl-C "
            "gives it up). Call wait_until_finished(), or close the manager, to be told of its "
            "failure."
        )
    for thread in running:
        threading.Thread.join(thread)  # Orbax's own raises what it failed with.
    if savers:
        FUNCTIONS.await_all()
    failures = [part.failure for part in unknown if part.failure is not None]
    for saver in savers:
        try:
            # Several processes may not wait for each other here: not all of them need be ending.
            if jax.process_count() == 1:
                end_all(saver)
            else:
                saver.publications.catch_up(raises=True)
        except Exception as error:  # noqa: BLE001 - It is logged.
            failures.append(error)
    for failure in dict.fromkeys(failures):
        _log.error("A save in flight when the main thread ended has failed: %s", failure)


def _forget() -> None:
    """In a forked child, which has none of the threads."""
    _SAVERS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
