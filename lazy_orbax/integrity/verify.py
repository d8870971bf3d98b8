"""Whether a checkpoint is what was saved: without a model, without devices, out of core."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from lazy_orbax import _paths
from lazy_orbax._paths import COMMITTED, STEP_METADATA
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    MissingFileError,
    OptionError,
    Problem,
)
from lazy_orbax.integrity import digest_file, step_metadata
from lazy_orbax.integrity.step_place import is_item, is_run, is_step, metadata_beside, what_it_holds
from lazy_orbax.integrity.stored_item import Piece, StoredItem
from lazy_orbax.integrity.verify_report import ItemReport, VerifyReport
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.malformed import refuse_malformed

# How long an error that names the newest whole step may take to find it.
_SEARCH_S = 60.0
_GIVE = "Give the directory of an item, a step or a run."
_OWN_RUN = "it is a run of its own: verify that"
_NO_DIGESTS = (
    "it has no digests: saved by stock Orbax, by another handler or by an older lazy_orbax"
)


class _Watch:
    """Watches over the reading of pieces: how far it is, and whether there is time left.

    Attributes:
        until_s: when there is none.
        tell: what is called with the bytes that were read, and those that are known of.
    """

    def __init__(self, until_s: float = math.inf, tell: Callable[[int, int], None] | None = None):
        self.until_s, self.tell = until_s, tell
        self._done_bytes = self._all_bytes = 0

    def over(self, stored: StoredItem) -> Iterator[Piece]:
        """Yields the pieces of an item.

        Raises:
            TimeoutError: there is no time left.
        """
        self._all_bytes += stored.n_bytes if self.tell else 0
        for piece in stored.pieces:
            if time.monotonic() >= self.until_s:
                raise TimeoutError("There was no time to read all of it.")
            yield piece
            if self.tell:
                self._done_bytes += stored.bytes_of(piece)
                self.tell(self._done_bytes, self._all_bytes)


def verify(path: Any, *, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Reads a checkpoint and compares its bytes with the digests that were saved with it.

    It changes nothing, and needs neither the model nor a device. It reads 64 MiB at a time. Where
    a chunk is compressed, or is larger and in an encoding of its own, it holds one whole chunk.

    Args:
        path: the directory or `gs://` address of an item, of a step, or of a run with many steps:
            a `str` or `os.PathLike`.
        on_progress: is called with the bytes that were read, and with those that are known of: of
            a run, the steps that were begun.

    Returns:
        What it found: the items with what they hold, and every problem with the leaf, the file and
        the place in the leaf. A damaged checkpoint raises nothing.

    Raises:
        OptionError: `path` is no path, or there is no checkpoint. If the directory holds runs, the
            message names them.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"verify takes a path, and found {path!r}. {_GIVE}")
    place = place_of(os.fspath(path)).as_path()
    if not place.is_dir():
        raise OptionError(f"{place} is not a directory. {_GIVE}")
    children, watch = sorted(child.name for child in place.iterdir()), _Watch(tell=on_progress)
    if is_item(children):
        step = _step_problems(place, children, is_item=True) if STEP_METADATA in children else []
        return VerifyReport(str(place), (_verify_item(place, watch),), tuple(step))
    if is_step(place, children):
        items, problems = _verify_step(place, children, watch)
        return VerifyReport(str(place), tuple(items), tuple(problems))
    items, problems = _verify_run(place, children, watch)
    if not problems and all(item.not_covered == (_OWN_RUN,) for item in items):
        found = what_it_holds(place, children)
        raise OptionError(found or f"{place} holds no checkpoint. {_GIVE}")
    return VerifyReport(str(place), tuple(items), tuple(problems))


def problems_before_publication(step: str) -> list[Problem]:
    """Reads a step that is about to be published. Returns what may not be what was saved.

    Args:
        step: its directory by now, or its address. Its items are finished.
    """
    place = place_of(step).as_path()
    items = [_verify_item(child, _Watch()) for child in sorted(place.iterdir()) if child.is_dir()]
    problems = [problem for item in items for problem in item.problems]
    for item in items:
        problems += [
            Problem(f"was not compared: {what}", item.directory) for what in item.not_covered
        ]
    return problems if items else [Problem("holds no item", step)]


def newest_whole_step(directory: str) -> int | None:
    """Returns the newest other step of the same run whose item of this name is whole.

    Args:
        directory: the directory of an item that is not.

    Raises:
        TimeoutError: for so long none was found. A step is read as a whole to know.
    """
    until_s = time.monotonic() + _SEARCH_S
    place = place_of(directory).as_path()
    step = place_of(metadata_beside(directory) or _paths.step_directory(directory)).as_path()
    inner = "" if step == place else place.name
    if _paths.step_of(step.name) is None:
        return None
    for path, number, is_temporary in reversed(_paths.steps_in(step.parent)):
        if is_temporary or path.name == step.name:
            continue
        candidate = path / inner if inner else path
        if candidate.is_dir():
            found = _verify_item(candidate, _Watch(until_s))
            if found.is_covered and not found.problems:
                return number
    return None


def raise_corrupt(
    directory: str, problems: list[Problem], cause: BaseException | None = None, *, look: bool
) -> None:
    """Raises, where there are problems, the error that names them and the newest whole step.

    Args:
        directory: the item's directory.
        problems: what is wrong with it.
        cause: what brought it up, if it was an error.
        look: whether to look for another step that is whole.

    Raises:
        CorruptCheckpointError: there are problems.
        MissingFileError: the cause is that a file was not found.
    """
    if problems:
        newest, kind = None, CorruptCheckpointError
        if isinstance(cause, FileNotFoundError):
            kind, problems = MissingFileError, [*problems, Problem(str(cause))]
        try:
            newest = newest_whole_step(directory) if look else None
        except TimeoutError:
            look = False
        raise kind(directory, problems, newest_whole_step=newest, looked=look) from cause


def _verify_step(
    place: Any, children: list[str], watch: _Watch
) -> tuple[list[ItemReport], list[Problem]]:
    if is_item(children):
        return [_verify_item(place, watch)], _step_problems(place, children, is_item=True)
    problems = _step_problems(place, children, is_item=False)
    items = [
        _verify_item(place / name, watch)
        for name in children
        if not name.startswith(".") and (place / name).is_dir()
    ]
    if not items:
        problems.append(Problem("holds no item"))
    return items, problems


def _verify_run(
    place: Any, children: list[str], watch: _Watch
) -> tuple[list[ItemReport], list[Problem]]:
    items, problems = [], []
    for name in sorted(children, key=lambda name: (_paths.step_of(name) or 0, name)):
        child = place / name
        if not child.is_dir() or (_paths.step_of(name) is None and _paths.TEMPORARY not in name):
            continue
        if _paths.TEMPORARY in name:
            problems.append(Problem("was never committed", str(child)))
            continue
        parts = sorted(part.name for part in child.iterdir())
        if is_run(child, parts):
            items.append(ItemReport(str(child), 0, 0, (_OWN_RUN,), ()))
            continue
        found, wrong = _verify_step(child, parts, watch)
        items += found
        problems += [
            dataclasses.replace(p, file="/".join(filter(None, (str(child), p.file)))) for p in wrong
        ]
    return items, problems


def _step_problems(place: Any, children: list[str], *, is_item: bool) -> list[Problem]:
    """Returns what is wrong with what Orbax keeps of a step beside its items."""
    problems = []
    if _paths.is_temporary(str(place)):
        problems.append(Problem("was never committed"))
    if not place_of(str(place)).is_committed(children):
        problems.append(Problem("is missing: the step was never committed", COMMITTED))
    items = [place] if is_item else [place / name for name in children if (place / name).is_dir()]
    if STEP_METADATA in children:
        problems += _broken(place, children, is_item=is_item)
    told = [problem for item in items for problem in step_metadata.check(str(item), str(place))]
    return problems + [p for p in dict.fromkeys(told) if not problems or p.file != STEP_METADATA]


def _broken(place: Any, children: list[str], *, is_item: bool) -> list[Problem]:
    """Returns what is wrong with a step's metadata, without any digest."""
    try:
        found = json.loads(place_of(str(place)).read(STEP_METADATA))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, OSError, RecursionError) as error:
        return [Problem(f"cannot be read: {error}", STEP_METADATA)]
    items = found.get("item_handlers")
    if not isinstance(items, dict) or is_item:
        return []
    missing = [name for name in items if name not in children]
    return [Problem("is missing; it was saved as an item of this step", n) for n in missing]


def _verify_item(place: Any, watch: _Watch) -> ItemReport:
    directory = str(place)
    try:
        contents = refuse_malformed(place, None, digest_file.DIRECTORY)
    except MalformedCheckpointError as error:
        return ItemReport(directory, 0, 0, (), (error.problem,))
    stored = StoredItem(directory, contents.files if contents else None)
    if not stored.is_covered:
        return ItemReport(directory, 0, 0, (_NO_DIGESTS,), ())
    found = stored.check_pieces(watch.over(stored), contents)
    problems = [*stored.problems, *stored.check_files(), *found]
    others = tuple(f"leaf {name}: its own type handler wrote it" for name in stored.others)
    n_leaves = len(stored.leaves) + len(stored.strings)
    return ItemReport(directory, n_leaves, stored.n_bytes, others, tuple(problems))
