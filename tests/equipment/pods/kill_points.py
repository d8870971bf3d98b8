"""Exact points of a save at which a test kills a process, whatever the save goes to.

A gate is at a point of one process, the *watched* one. When that arrives there, a *victim* is
killed with SIGKILL: the watched process itself, or another of the same machine. Nothing sleeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import ocdbt_utils

from lazy_orbax.pods import agreement
from lazy_orbax.save import commit, pipeline, writer
from lazy_orbax.snapshot import device_to_host

_WHERE: dict[str, tuple[Any, str]] = {
    "snapshot": (pipeline.Save, "snapshot"),
    "copy of a slab": (device_to_host, "take"),
    "transfer of a slab": (device_to_host, "to_host"),
    "opening of the store": (writer.Writer, "__init__"),
    "hand-over of a slab": (writer.Writer, "write"),
    "finish": (writer.Writer, "finish"),
    "telling": (agreement.Agreement, "settle"),
    "merge": (commit.Commit, "_merged"),
    "validation of the merge": (ocdbt_utils, "_validate_params"),
    "commit": (atomicity, "on_commit_callback"),
}

# Points that every process passes, and points that only the primary one passes.
ON_EACH = (
    "before the snapshot",
    "before the copy of a slab",
    "after the snapshot",
    "before the transfer of a slab",
    "after the transfer of a slab",
    "before the opening of the store",
    "before the hand-over of a slab",
    "after the hand-over of a slab",
    "before the finish",
    "after the finish",
    "before the telling",
    "after the telling",
)
ON_PRIMARY = (
    "before the merge",
    "before the validation of the merge",  # In the middle: copied, and the copy not committed.
    "after the merge",
    "before the commit",
    "after the commit",
)


def is_committed(point: str, victim: int) -> bool:
    """Whether the save is committed in which a process was killed at a point."""
    # Where another process is killed when the primary begins to commit, that goes on.
    return point == "after the commit" or (victim != 0 and point == "before the commit")


@contextlib.contextmanager
def killing(point: str, victim_pid: int) -> Iterator[None]:
    """Kills `victim_pid` when this process comes to `point`, once.

    Args:
        point: one of `ON_EACH` or `ON_PRIMARY`.
        victim_pid: a process of this machine, or this one.
    """
    moment, _, place = point.partition(" the ")
    owner, name = _WHERE[place]
    original = getattr(owner, name)
    lock, done = threading.Lock(), []

    def kill() -> None:
        with lock:
            if not done:
                done.append(True)
                os.kill(victim_pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, _gated(original, moment, kill))
        yield


def _gated(original: Callable[..., Any], moment: str, kill: Callable[[], None]) -> Any:
    if place_is_async := original.__code__.co_flags & 0x80:

        async def gated_coroutine(*args: Any, **kwargs: Any) -> Any:
            if moment == "before":
                kill()
            result = await original(*args, **kwargs)
            if moment == "after":
                kill()
            return result

    def gated(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            kill()
        result = original(*args, **kwargs)
        if moment == "after":
            kill()
        return result

    return gated_coroutine if place_is_async else gated
