"""Where Orbax is with a save: what it promised, who waits, what it forgot."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from lazy_orbax._orbax.symbols import SRC, ocp

# Orbax reports these durations through JAX's public monitoring, in the thread that published the
# step, directly after it did: the only sign of that moment that reaches a handler. The last is the
# only one that comes from v1's functions before other processes hear of the step.
PUBLISHED_EVENTS = frozenset(
    {
        "/jax/orbax/write/background_finalize_secs",
        "/jax/orbax/write/finalize_duration_secs",
        "/jax/checkpoint/write/duration_since_last_checkpoint_secs",
    }
)
# Of the threads in which v1 waits for an item, by Python's own naming. They publish nothing.
_WAITING_ONLY = "asyncio_"
# In which Orbax waits for the items of a step and publishes it; in which a manager waits for that.
COMMIT_THREAD, MANAGER_THREAD = "async_save", "save_finalize"


def operation_id() -> str:
    """Returns which save, of all that this process began, Orbax is at."""
    return SRC["operation_ids"].get_current_operation_id()


def may_be_publishing() -> bool:
    """Whether a thread is there in which Orbax waits for items and publishes steps, of any save."""
    return any(thread.name == COMMIT_THREAD for thread in threading.enumerate())


def publisher() -> threading.Thread | None:
    """Returns this thread, if the one that waits for an item publishes the step afterwards."""
    thread = threading.current_thread()
    return None if thread.name.startswith(_WAITING_ONLY) else thread


def is_publishing_thread(thread: threading.Thread) -> bool:
    """Whether Orbax began a thread to publish one step, with which it ends."""
    return thread.name == COMMIT_THREAD


def manager_that_saves() -> ocp.CheckpointManager | None:
    """Returns the manager that has called this, or `None`. It looks at the frames of its callers.

    For managers that nobody registered: they do not tell their handlers of themselves.
    """
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
