"""The steps of a tier that were promoted there: which are listed, unfinished, or one too many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import tensorstore as ts
from etils import epath

from lazy_orbax import _paths
from lazy_orbax.errors import KeeperError
from lazy_orbax.recovery import leftovers
from lazy_orbax.storage.fsync import sync_all
from lazy_orbax.storage.places import place_of

# What is being removed: Orbax's mark tells everybody that it is no step.
_GOING = f"{_paths.TEMPORARY}-going"


def newest_in(tier: str) -> int:
    """Returns the newest step that a tier lists, whoever saved it; -1 if there is none."""
    return max((step for step, _ in listed(tier)), default=-1)


def refuse_others(tier: str, run: str) -> None:
    """Refuses a tier to which steps of another run were brought: a restore takes the newest there.

    Args:
        tier: the directory.
        run: the run.

    Raises:
        KeeperError: there is such a step.
    """
    for _, path in listed(tier):
        if (other := run_of(path)) not in (None, run):
            raise KeeperError(f"{path} is of the run {other!r}; give each run tiers of its own")


def remove_unfinished(tier: str, run: str) -> None:
    """Removes what promotions of a run left that were killed, and nothing else.

    Args:
        tier: the directory.
        run: the run.

    Raises:
        KeeperError: something could not be removed.
        OSError: the storage refused.
    """
    for path, step, _ in _directories(tier):
        is_ours = path.name.endswith(_GOING) or run_of(path) == run
        if is_ours and (step is None or not _is_listed(path)):
            _remove(str(path))


def retire(tier: str, run: str, keep: int) -> None:
    """Removes the oldest steps that a run has there. Each is unlisted before its first byte goes.

    Args:
        tier: the directory.
        run: the run.
        keep: how many stay.

    Raises:
        KeeperError: a step could not be removed.
        OSError: the storage refused.
    """
    promoted = [path for _, path in listed(tier) if run_of(path) == run]
    for path in promoted[:-keep]:
        _remove(str(path))


def listed(tier: str) -> Iterator[tuple[int, Any]]:
    """Yields each step that a tier lists, whoever saved it, with its path; the oldest one first."""
    for path, step, _ in _directories(tier):
        # A directory beside may be called `exp-2024`.
        is_step = path.name.isdecimal() or place_of(str(path)).peek(_paths.STEP_METADATA)
        if step is not None and is_step and _is_listed(path):
            yield step, path


def _directories(tier: str) -> list[_paths.StepDirectory]:
    try:
        return _paths.steps_in(epath.Path(tier))
    except FileNotFoundError:  # In a bucket a directory comes with the first object in it.
        return []


def _is_listed(path: Any) -> bool:
    if _paths.is_temporary(str(path)):
        return False
    place = place_of(str(path))
    return place.needs_sync or place.peek(_paths.COMMITTED) is not None


def run_of(path: Any) -> str | None:
    """Returns the run of which a step was brought to its tier; `None`: nobody brought it there."""
    mark = place_of(str(path)).peek(_paths.PROMOTED)
    try:
        return None if mark is None else str(json.loads(mark)["run"])
    except (ValueError, KeyError, TypeError):
        return ""


def _remove(directory: str) -> None:
    """Removes a step: nobody lists it from the first moment, and it is found till the last."""
    place = place_of(directory)
    if place.needs_sync:
        going, tier = f"{_paths.published(directory)}{_GOING}", os.path.dirname(directory)
        if directory != going:
            leftovers.remove([going] if os.path.lexists(going) else [])
            os.rename(directory, going)
            sync_all(lambda: [tier], tier, timeout_s=place.timeout_s)
        if not leftovers.remove([going]):
            raise KeeperError(f"{going} could not be removed; the next promotion tries again")
        return
    mark = _paths.PROMOTED
    place.kvstore.write(_paths.COMMITTED, None).result()
    for others in (ts.KvStore.KeyRange("", mark), ts.KvStore.KeyRange(f"{mark}\0", "")):
        place.kvstore.delete_range(others).result()
    place.kvstore.write(mark, None).result()
