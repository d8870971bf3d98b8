"""What is an item, a step or a run, and which step an item is of.

Orbax names a step by its number, behind a prefix that is the same for all steps of a run. An item
that lies in another step of such a name than it was saved in holds another state than who asks for
that step expects: a backup that went wrong, say. What else is copied or renamed is as good as
before: to another run, to a name that is no step's or has another prefix, or an item alone, to a
directory that has no metadata of a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lazy_orbax import _paths
from lazy_orbax._paths import DIGESTS, MANIFEST, STEP_METADATA, TREE
from lazy_orbax.errors import Problem, summarize
from lazy_orbax.storage.places import place_of

if TYPE_CHECKING:
    from lazy_orbax.integrity.digest_file import ProcessDigests

_ITEM_FILES = (TREE, MANIFEST, DIGESTS)
_STEP = re.compile(r"(?:(.*)[_-])?(\d+)")


def metadata_beside(item_directory: str) -> str | None:
    """Returns which of them has the metadata of the step, if one has."""
    places = _paths.places_of_step(item_directory)
    return next((place for place in places if place_of(place).has(STEP_METADATA)), None)


def is_item(children: list[str]) -> bool:
    """Whether a directory in which these lie is an item's."""
    return any(name in children for name in _ITEM_FILES)


def is_step(place: Any, children: list[str]) -> bool:
    """Whether a directory in which these lie is a step's, perhaps of one item that is the step."""
    return is_item(children) or STEP_METADATA in children or _has_items(place, children)


def is_run(place: Any, children: list[str]) -> bool:
    """Whether steps lie in a directory that is none itself."""
    if is_step(place, children):
        return False
    for child in (place / name for name in children if _paths.step_of(name) is not None):
        parts = [part.name for part in child.iterdir()] if child.is_dir() else []
        if STEP_METADATA in parts or _has_items(child, parts):  # Not an item with such a name.
            return True
    return False


def _has_items(place: Any, children: list[str]) -> bool:
    is_named_step = _paths.step_of(place.name) is not None
    for child in (place / name for name in children if _paths.step_of(name) is None):
        parts = [part.name for part in child.iterdir()] if child.is_dir() else []
        # One with the metadata of a step is no item of another, unless a number says so.
        if is_item(parts) and (is_named_step or STEP_METADATA not in parts):
            return True
    return False


def runs_and_checkpoints_in(place: Any, children: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the runs, and the checkpoints that are of no run, which lie in a directory itself."""
    runs, alone = [], []
    for child in (place / name for name in sorted(children) if (place / name).is_dir()):
        parts = [part.name for part in child.iterdir()]
        if is_run(child, parts):
            runs.append(str(child))
        elif STEP_METADATA in parts:
            alone.append(str(child))
    return runs, alone


def what_it_holds(place: Any, children: Iterable[str]) -> str:
    """Says of a directory that is none of these which of them lie in it; empty for none."""
    runs, alone = runs_and_checkpoints_in(place, children)
    kinds = " and ".join(["runs"] * bool(runs) + ["checkpoints"] * bool(alone))
    found = summarize(sorted(runs + alone))
    return f"{place} is not a run, but holds {kinds}. Give one:{found}" if kinds else ""


def wrong_step(saved: ProcessDigests, item_directory: str) -> Problem | None:
    """Returns what is wrong if an item lies in another step than it was saved in.

    Args:
        saved: the digests of one process.
        item_directory: where they lie.
    """
    directory = place_of(item_directory).absolute
    names = _paths.names_of(directory)
    for level in range(-1, -1 - len(names), -1):
        found = _differing(saved, names, level)
        if found is not None and _is_named(directory, names, level):
            what = (
                f"says that this item was saved at step {found[0]}, and it lies in step "
                f"{found[1]}: the files of another step are in place of its own. If they were "
                "copied on purpose, restore with LazyOptions(verify_restore=False)"
            )
            return Problem(what, f"{DIGESTS}/process_{saved.process}")
    return None


def _differing(saved: ProcessDigests, names: tuple[str, ...], level: int) -> tuple[int, int] | None:
    """Returns the step under which an item was saved and the one where it lies, if they differ.

    Args:
        saved: its digests.
        names: of its directory and the one above it, the latter first.
        level: which of the names is looked at.
    """
    here = _STEP.fullmatch(names[level])
    if here is None:
        return None
    if not saved.place:
        # An older lazy_orbax noted a number of one of the two names, and not of which.
        numbers = [int(found[2]) for name in names if (found := _STEP.fullmatch(name))]
        is_other = saved.step is not None and here[1] is None and saved.step not in numbers
        return (saved.step, int(here[2])) if saved.step is not None and is_other else None
    there = _STEP.fullmatch(saved.place[level]) if len(saved.place) >= -level else None
    if there is None or there[1] != here[1] or int(there[2]) == int(here[2]):
        return None
    return int(there[2]), int(here[2])


def _is_named(directory: str, names: tuple[str, ...], level: int) -> bool:
    """Whether it is this name that is the step's."""
    place = metadata_beside(directory)
    if place is None:
        return level == -2 and names[level].isdigit()
    return place == _paths.places_of_step(directory)[-1 - level]
