"""What lies at a path: an item, a step, a run, or a directory of runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError, OptionError
from lazy_orbax.integrity import step_place
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.bounded_json import parse_json
from lazy_orbax.trust.files import ItemFiles, survey

ITEM, STEP, RUN, RUNS = "item", "step", "run", "directory of runs"
# Metadata of a step: Orbax's have some hundred bytes, and users may add their own.
_MOST_STEP_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Seen:
    """What lies at a path.

    Attributes:
        kind: what it is.
        path: where, as a path object.
        names: what lies in it, in order.
    """

    kind: str
    path: Any
    names: tuple[str, ...]


def look(path: Any, wanted: Iterable[str]) -> Seen:
    """Finds out what lies at a path.

    Args:
        path: a directory or its `gs://` address.
        wanted: the kinds that the caller can use.

    Raises:
        OptionError: it is no path, or nothing of these kinds lies there.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"Give a path: found {path!r}.")
    place = place_of(os.fspath(path)).as_path()
    if not place.name:  # TensorStore takes no dot for a directory.
        place = place_of(place_of(str(place)).absolute).as_path()
    wanted = tuple(wanted)
    give = f"Give a {' or a '.join(wanted)}.".replace("a item", "an item")
    if not place.is_dir():
        raise OptionError(f"{place} is not a directory. {give}")
    names = sorted(child.name for child in place.iterdir())
    kind = _kind_of(place, names)
    if kind == RUNS and RUNS not in wanted and (found := step_place.what_it_holds(place, names)):
        raise OptionError(found)
    if kind not in wanted:
        found = "holds no checkpoint" if kind == RUNS else f"is {_a(kind)}"
        raise OptionError(f"{place} {found}. {give}")
    return Seen(kind, place, tuple(names))


def _a(kind: str) -> str:
    return f"{'an' if kind == ITEM else 'a'} {kind}"


def _kind_of(place: Any, names: list[str]) -> str:
    if step_place.is_item(names):
        return ITEM
    if step_place.is_run(place, names):
        return RUN
    if step_place.is_step(place, names):
        return STEP
    # Of the first save of a run that was killed there may be hardly anything.
    return RUN if any(map(_paths.is_temporary, names)) else RUNS


def items_of(seen: Seen) -> dict[str, str]:
    """Returns the directories of the items of a step or an item, by name."""
    if seen.kind == ITEM:
        return {_paths.published(seen.path.name): str(seen.path)}
    inside = [n for n in seen.names if not n.startswith(".") and (seen.path / n).is_dir()]
    return {_paths.published(name): str(seen.path / name) for name in inside}


def newest_step(seen: Seen) -> Seen:
    """Returns the newest published step of a run.

    Raises:
        OptionError: there is none.
    """
    for path, _, is_temporary in reversed(_paths.steps_in(seen.path)):
        if not is_temporary and path.is_dir():
            names = sorted(child.name for child in path.iterdir())
            if place_of(str(path)).is_committed(names):
                return Seen(ITEM if step_place.is_item(names) else STEP, path, tuple(names))
    raise OptionError(f"{seen.path} has no committed step.")


def sizes_in(directory: str) -> dict[str, int]:
    """Returns the bytes of every file below a directory, by its path relative to it.

    Raises:
        MalformedCheckpointError: there is something else than files and directories.
        OSError: nobody could list them.
    """
    place = place_of(directory)
    if place.has_special_files:
        return survey(directory)
    with place.listed() as listed:
        if listed is None:
            raise OSError(f"{directory} cannot be listed. For gs://, install gcsfs.")
        return listed


def step_metadata(directory: str) -> dict[str, Any]:
    """Returns what Orbax keeps of a step beside its items; nothing where it keeps nothing.

    Raises:
        MalformedCheckpointError: it is no JSON object, or too large.
    """
    files = ItemFiles(place_of(directory))
    content = files.read(_paths.STEP_METADATA, _MOST_STEP_BYTES)
    if not content:
        return {}
    found = parse_json(content, files.path(_paths.STEP_METADATA))
    if not isinstance(found.get("item_handlers"), dict | str | None):
        what = "item_handlers that are no object"
        raise MalformedCheckpointError(files.path(_paths.STEP_METADATA), what, "an object")
    return found
