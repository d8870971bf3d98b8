"""The names of Orbax's files and directories, and what a path says.

A checkpoint manager saves an *item* to `run/step/item`; without a manager a step has no items, and
is one itself.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

TEMPORARY = ".orbax-checkpoint-tmp"
"""In the name of every local directory, of a step or an item, that is not published yet."""
COMMITTED = "commit_success.txt"
"""Says in an object store that a step is published: a directory cannot be renamed there."""
STEP_METADATA = "_CHECKPOINT_METADATA"
"""JSON of a step: its items and their handlers, its times, its custom metadata."""
STEP_OF_V1 = "orbax.checkpoint"
"""An empty file in a step that v1 saved, there before the metadata where a function of v1 does."""
PROMOTED = "lazy_orbax_promoted.json"
"""In a step that a keeper brought to a tier, from its beginning: of which run it is."""
MEETING = "lazy_orbax_meeting"
"""A directory of a tier, in which keepers of several machines tell each other of a step."""
ROOT_METADATA = "metadata/_ROOT_METADATA"
"""JSON of a run: the custom metadata that a manager was given for all its steps."""

TREE = "_METADATA"
"""JSON of an item: its tree, the type of each leaf, how arrays are stored, custom metadata."""
SHARDINGS = "_sharding"
"""JSON of an item: the sharding that each array had when it was saved."""
STRINGS = "_strings.json"
"""JSON of an item: the leaves that are strings."""
DIGESTS = "lazy_orbax_digests"
"""A directory of an item with what lazy_orbax adds to it: digests of everything else."""
ARRAY_METADATAS = "array_metadatas"
"""A directory of an item with JSON of each process: shapes of shards and chunks, kinds of keys."""
MANIFEST = "manifest.ocdbt"
"""The root of an OCDBT database: of an item, and of each process in it."""
PROCESS_DIRECTORY = "ocdbt.process_"
"""How the directory in an item begins where one process writes its OCDBT database."""
ZARR_V2, ZARR_V3 = ".zarray", "zarr.json"
"""The metadata of one array, in either version of Zarr."""


class StepDirectory(NamedTuple):
    """A directory in a run that is a step by its name.

    Attributes:
        path: where it is, in the form in which the run was given.
        step: the step; `None` where the name of a temporary directory tells none.
        is_temporary: whether the step is not published.
    """

    path: Any
    step: int | None
    is_temporary: bool


def is_temporary(path: str) -> bool:
    """Whether a name, or the last name of a path, is that of a directory not published yet."""
    return TEMPORARY in _last_name(path)


def published(directory: str) -> str:
    """Returns what a temporary directory is called once it is published, whatever is above it."""
    above, slash, name = directory.rpartition("/")
    return f"{above}{slash}{name.partition(TEMPORARY)[0]}"


def final(item_directory: str) -> str:
    """Returns the path of an item once its step is published.

    A directory above the step may have any name, and keeps it.
    """
    item = item_directory.rstrip("/")
    above, slash, name = item.rpartition("/")
    above = published(above) if _is_around(above, name) else above
    return published(f"{above}{slash}{name}") + item_directory[len(item) :]


def without_dots(path: str) -> str:
    """Returns a local path without `..`, which TensorStore refuses and Orbax takes as text.

    It is the directory that the file system finds: a link before the dots is followed.
    """
    return os.path.realpath(path) if "/../" in f"/{path}/" and "://" not in path else path


def absolute(path: str) -> str:
    """Returns a path that is the same from every working directory, without a slash at its end."""
    path = without_dots(path)
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def is_in(path: str, other: str) -> bool:
    """Whether a directory is another one, or in it, whatever links lead there."""
    path, other = (
        os.path.normpath(one) if "://" in one else os.path.realpath(one) for one in (path, other)
    )
    return f"{path}/".startswith(f"{other.rstrip('/')}/")


def step_of(name: str) -> int | None:
    """Returns the step that a directory's name tells, such as 12 for `12` or `step_12`."""
    match = re.fullmatch(r"(?:.*[_-])?(\d+)", name.partition(TEMPORARY)[0])
    return int(match.group(1)) if match else None


def step_of_item(directory: str) -> int | None:
    """Returns the step in an item's path such as `run/12/state`, if there is one."""
    return step_of(_last_name(step_directory(directory)))


def step_directory(item_directory: str) -> str:
    """Returns the directory of an item's step, by its name; empty where no name tells one.

    While a step is saved, Orbax's marks tell its directory from an item's. Then only names do: a
    bare number is a step before `step_12` is, and of `step_12/params_2` the first.
    """
    item, above = places_of_step(item_directory)
    if _is_around(above, _last_name(item)):
        return above
    if is_temporary(item):
        return item
    numbers = [place for place in (item, above) if _last_name(place).isdecimal()]
    names = [place for place in (above, item) if step_of(_last_name(place)) is not None]
    return next(iter(numbers + names), "")


def names_of(item_directory: str) -> tuple[str, ...]:
    """Returns the last names of an item's path once it is published: its step's and its own."""
    return tuple(name for name in final(item_directory).split("/") if name)[-2:]


def item_of(directory: str) -> str:
    """Returns what the directories of one item have in common over the steps of a run."""
    step = step_directory(directory)
    if step_of(_last_name(step)) is None:
        return final(directory)
    name = final(directory.rstrip("/")[len(step) :])
    return f"{step.rpartition('/')[0]}/*{name}"


def places_of_step(item_directory: str) -> tuple[str, str]:
    """Returns the directories that may be the step of an item: its own, and the one above it."""
    item = item_directory.rstrip("/")
    return item, item.rpartition("/")[0]


def places_of_run(item_directory: str) -> set[str]:
    """Returns the directories that may be the run of an item: those above its step."""
    return {step.rpartition("/")[0] for step in places_of_step(item_directory)} - {""}


def temporary_root(directory: str) -> str:
    """Returns the temporary directory of the step that an item belongs to, or an empty string."""
    if not os.path.isabs(directory):
        return ""
    item, above = places_of_step(directory)
    if _is_around(above, _last_name(item)):
        return above
    return item if is_temporary(item) else ""


def steps_in(run: Any) -> list[StepDirectory]:
    """Returns what is a step by its name, oldest first, and every temporary directory.

    Args:
        run: a directory with many steps, as a path object with `iterdir`.
    """
    children = [(child, step_of(child.name), is_temporary(child.name)) for child in run.iterdir()]
    found = [StepDirectory(*each) for each in children if each[1] is not None or each[2]]
    return sorted(found, key=lambda each: (each.step or 0, each.path.name))


def _is_around(above: str, name: str) -> bool:
    """Whether a directory is the temporary one of a step that has an item of this name.

    A step may be called anything. Only a bare number below such a name is a step of its own.
    """
    above = _last_name(above)
    may_be = is_temporary(name) or step_of(above) is not None or not name.isdecimal()
    return is_temporary(above) and may_be


def _last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
