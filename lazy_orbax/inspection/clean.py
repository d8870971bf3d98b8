"""What killed saves and exports left: found, and removed when that is asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError
from lazy_orbax.inspection.looking import RUN, RUNS, look
from lazy_orbax.recovery import leftovers
from lazy_orbax.recovery.unfinished_exports import exports_in, held
from lazy_orbax.storage.places import place_of
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import duration_of, size_of
from lazy_orbax.view.viewed import Viewed

# A save that has written nothing for so long is given up.
QUIET_S = 3600.0
_COLUMNS = (
    Column("directory"),
    Column("size", is_number=True),
    Column("quiet for", is_number=True),
    Column(""),
)


@dataclasses.dataclass(frozen=True)
class Abandoned:
    """A directory that was never published.

    Attributes:
        path: where it is.
        n_bytes: bytes of the files in it.
        quiet_s: for how many seconds nothing in it was written.
        removed: whether it was removed.
        kept: why it was not, or would not be; `None` if it was, or would be.
    """

    path: str
    n_bytes: int
    quiet_s: float
    removed: bool
    kept: str | None


@dataclasses.dataclass(frozen=True)
class CleanReport(Viewed):
    """What `clean` found.

    Attributes:
        path: the run.
        dry_run: whether nothing was to be removed.
        directories: those that were never published.
    """

    path: str
    dry_run: bool
    directories: tuple[Abandoned, ...]

    @property
    def ok(self) -> bool:
        """Whether all is gone that was to be."""
        return self.dry_run or all(each.removed or each.kept for each in self.directories)

    @property
    def n_bytes(self) -> int:
        """Bytes of what was removed, or would be."""
        return sum(each.n_bytes for each in self.directories if each.kept is None)

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = tuple(
            (each.path, size_of(each.n_bytes), duration_of(each.quiet_s), self._fate(each))
            for each in self.directories
        )
        done = "would be removed: give --remove to do it" if self.dry_run else "removed"
        summary = f"{size_of(self.n_bytes)} {done}" if rows else f"{self.path}: nothing was left"
        table = (Table(_COLUMNS, rows, self.path),) if rows else ()
        return (*table, Lines((summary,)))

    def _fate(self, each: Abandoned) -> str:
        if each.kept:
            return f"kept: {each.kept}"
        if self.dry_run:
            return "would be removed"
        return "removed" if each.removed else "could not be removed"


def clean(run: Any, *, dry_run: bool = True, quiet_s: float = QUIET_S) -> CleanReport:
    """Finds what killed saves and exports left, and removes it if that is wanted.

    That are directories with Orbax's mark of what is temporary, in an object store those of steps
    without Orbax's mark that they were committed, in a tier of a keeper what killed promotions
    left, with what they told each other, and the hidden directories of exports. Links are not
    followed.

    Args:
        run: a directory with many steps, such as a tier, or its `gs://` address; or a local
            directory in which there are hidden ones of exports.
        dry_run: whether to remove nothing, and only say what would be.
        quiet_s: what was written within so many seconds is kept: its save may be running. A clock
            of a file server that is wrong by more than this would deceive it.

    Raises:
        OptionError: there is no run, or `quiet_s` is negative.
        OSError: the storage refused.
    """
    if not quiet_s >= 0:
        raise OptionError(f"quiet_s: found {quiet_s!r}, wanted seconds, at least 0.")
    seen = look(run, (RUN, RUNS))
    is_local = place_of(str(seen.path)).has_special_files  # Exports are nowhere else.
    exports = [path for path in exports_in(seen.path) if path.is_dir()] if is_local else []
    meetings = [seen.path / _paths.MEETING] if _paths.MEETING in seen.names else []
    if seen.kind == RUNS and not exports and not meetings:
        look(run, (RUN,))  # Says what to give.
    found = [_cleaned(path, dry_run, quiet_s) for path in meetings if path.is_dir()]
    for path, _, is_temporary in _paths.steps_in(seen.path):
        if path.is_dir() and (is_temporary or _is_torn(path)):
            found.append(_cleaned(path, dry_run, quiet_s))
    for path in exports:
        with held(str(path)) as nobody_is_at_it:
            kept = None if nobody_is_at_it else "an export is at it"
            found.append(_cleaned(path, dry_run, quiet_s, kept))
    return CleanReport(str(seen.path), dry_run, tuple(found))


def _cleaned(path: Any, dry_run: bool, quiet_s: float, kept: str | None = None) -> Abandoned:
    """Removes a directory unless there is a reason to keep it."""
    n_bytes, written_s = _state_of(path)
    age_s = max(0.0, time.time() - written_s)
    if age_s < quiet_s:
        kept = kept or "it was written to just now"
    if _is_link(path):
        kept = "it is a link"
    removed = kept is None and not dry_run and _remove(path)
    return Abandoned(str(path), n_bytes, age_s, removed, kept)


def _is_torn(step: Any) -> bool:
    """Whether a step of an object store was begun and never committed, or is half removed."""
    names = {child.name for child in step.iterdir()}
    is_step = names & {_paths.STEP_METADATA, _paths.PROMOTED}
    return bool(is_step) and not place_of(str(step)).is_committed(names)


def _is_link(path: Any) -> bool:
    return place_of(str(path)).has_special_files and os.path.islink(path)


def _state_of(directory: Any) -> tuple[int, float]:
    """Returns the bytes of all files in a directory, and when something was last written there."""
    if not place_of(str(directory)).has_special_files:  # There a directory has no time.
        found, pending = [], [directory]
        while pending:
            for child in pending.pop().iterdir():
                (pending if child.is_dir() else found).append(child)
        told = [file.stat() for file in found]
        return sum(file.length for file in told), max((file.mtime for file in told), default=0.0)
    n_bytes, written_s = 0, os.stat(directory).st_mtime
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            written_s = max(written_s, status.st_mtime)
            n_bytes += status.st_size if name in files else 0
    return n_bytes, written_s


def _remove(directory: Any) -> bool:
    """Removes a directory. Returns whether it is gone."""
    if place_of(str(directory)).has_special_files:
        return leftovers.remove([str(directory)])
    directory.rmtree()
    return not directory.exists()
