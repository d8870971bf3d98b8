"""The threads of Orbax that wait for directories, and what if those will never exist."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from lazy_orbax._orbax import functions
from lazy_orbax._orbax.lifecycle import operation_id
from lazy_orbax._orbax.multihost import key_value_store
from lazy_orbax._orbax.symbols import MISSING
from lazy_orbax.errors import MAIN_THREAD_ENDED, SaveError

# How long Orbax may take to create the directories of a save that was refused.
_DIRECTORIES_S = 5.0


def promised_directories(operation: str) -> list[str]:
    """Returns the signals of directories that Orbax has begun to create and that do not exist yet.

    Args:
        operation: Orbax's name of the attempt to save a step.
    """
    store, here = key_value_store(), f"awaitable_signals_contract_{operation}"
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
        key_value_store().key_value_set(signal, "given up", allow_overwrite=True)
    return True


def leaving_nobody_waiting(async_save: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an `async_save` that leaves no thread of Orbax waiting where it refuses to save.

    Orbax is still creating the directories then. If the process, or the manager, ends in the middle
    of that, the threads that wait for them keep the process alive until they time out.
    """

    @functools.wraps(async_save)
    async def wrapped(*args: Any, **keywords: Any) -> Any:
        if MISSING:
            return await async_save(*args, **keywords)
        operation = operation_id()
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
    # v1's functions create directories only after all items were taken.
    within_s = 0 if functions.is_going_on(operation) else _DIRECTORIES_S
    deadline_s = time.monotonic() + within_s
    while promised_directories(operation) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    release_waiting(operation)
