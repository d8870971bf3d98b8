"""Where Orbax is with a save: what it promised, who waits, what it forgot."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import jax

from lazy_orbax._orbax.multihost import key_value_store
from lazy_orbax._orbax.symbols import SRC, ocp

# In which Orbax waits for the items of a step and publishes it.
_COMMIT_THREAD = "async_save"


def operation_id() -> str:
    """Returns which save, of all that this process began, Orbax is at."""
    return SRC["operation_ids"].get_current_operation_id()


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


def may_be_publishing() -> bool:
    """Whether a thread is there in which Orbax waits for items and publishes steps, of any save."""
    return any(thread.name == _COMMIT_THREAD for thread in threading.enumerate())


def manager_that_saves() -> ocp.CheckpointManager | None:
    """Returns the manager that has called this, because it does not tell its handlers of itself."""
    frame = inspect.currentframe()
    while frame is not None:
        # Only Orbax's own: to look at the locals of a frame may keep them for as long as it lives.
        if str(frame.f_globals.get("__name__")).startswith("orbax."):
            caller: Any = frame.f_locals.get("self")
            if isinstance(caller, ocp.CheckpointManager):
                return caller
        frame = frame.f_back
    return None


def retired_steps(manager: ocp.CheckpointManager) -> list[int] | None:
    """Returns which of its steps a manager will remove, or `None` where it cannot be asked."""
    return getattr(manager, "_get_old_steps_to_remove", lambda: None)()
