"""The steps that Orbax forgets when a save fails.

When a save begins, a checkpoint manager takes the steps that it is to replace off its list, and
removes them once it is committed. Where it fails they stay, off the list, and nothing removes them
any more: each failure leaves one, until a disk with room for few steps has room for no other.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import jax

from lazy_orbax import _paths
from lazy_orbax._orbax import lifecycle
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.storage.places import place_of

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("lazy_orbax")
# By their directories: Orbax does not tell a handler which manager it saves for, but a user may.
_MANAGERS: weakref.WeakValueDictionary[str, ocp.CheckpointManager] = weakref.WeakValueDictionary()


def register(saver: Any) -> None:
    """Notes which manager saves below its directory. Nothing happens for other objects."""
    if isinstance(saver, ocp.CheckpointManager):
        _MANAGERS[str(saver.directory)] = saver


def unregister(saver: Any) -> None:
    """Forgets a manager that is closed: another may save below the same directory."""
    if isinstance(saver, ocp.CheckpointManager) and _MANAGERS.get(str(saver.directory)) is saver:
        del _MANAGERS[str(saver.directory)]


def _manager_of(item_directory: str) -> ocp.CheckpointManager | None:
    """Returns the manager that saves an item: one that was registered, else one that calls this."""
    for run in _paths.places_of_run(item_directory):
        if (manager := _MANAGERS.get(run)) is not None:
            return manager
    return lifecycle.manager_that_saves()


def remember(failures: Sequence[BaseException], n_bytes: int, *, item_directory: str) -> None:
    """Gives the manager whose `save()` this is its steps back, because saves before it failed.

    Where they failed for want of room, the steps that the manager does not keep are removed now:
    the next save could not be committed before. Not where other processes save the same step: all
    of them would have to agree on that.

    Args:
        failures: what the earlier saves failed with.
        n_bytes: of the item that is saved now, not compressed.
        item_directory: of that item.
    """
    manager = _manager_of(item_directory)
    if manager is None:
        return
    try:
        manager.reload()
        if jax.process_count() == 1 and _is_short_of_room(failures, manager, n_bytes):
            _remove_retired(manager)
    except Exception:  # noqa: BLE001 - The save may work nevertheless.
        _log.exception("The steps in %s could not be listed, or not removed.", manager.directory)


def _is_short_of_room(
    failures: Sequence[BaseException], manager: ocp.CheckpointManager, n_bytes: int
) -> bool:
    """Whether it was room that the earlier saves wanted, or that this one will want."""
    if any(getattr(failure, "errno", None) in _NO_ROOM for failure in failures):
        return True
    return place_of(str(manager.directory)).free_bytes() < n_bytes


def _remove_retired(manager: ocp.CheckpointManager) -> None:
    newest, retired = manager.latest_step(), lifecycle.retired_steps(manager)
    if retired is None:
        _log.warning("Which steps this Orbax does not keep in %s is unknown.", manager.directory)
    for step in retired or ():
        if step != newest:
            _log.warning(
                "Step %d in %s is removed before the next is saved: there was no room for that, "
                "and the manager does not keep it.",
                step,
                manager.directory,
            )
            manager.delete(step)
