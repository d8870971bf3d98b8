"""The steps of a run: how old, how large, whether committed, with which items, by whom."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.inspection.looking import RUN, RUNS, look, sizes_in, step_metadata
from lazy_orbax.integrity import step_place
from lazy_orbax.storage.places import place_of
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import counted, duration_of, size_of
from lazy_orbax.view.viewed import Viewed

_COLUMNS = (
    Column("step", is_number=True),
    Column("state"),
    Column("age", is_number=True),
    Column("size", is_number=True),
    Column("items"),
    Column("digests"),
    Column("written by"),
)


@dataclasses.dataclass(frozen=True)
class StepEntry:
    """What is to be seen of a step without reading its arrays.

    Attributes:
        path: the step's directory.
        step: its number, or `None` if its name tells none.
        state: `committed`; `temporary` if it was never published, because its save runs or was
            killed; `torn` if an object store has no mark that it was; `malformed`.
        n_bytes: bytes of its files.
        n_files: how many there are.
        items: names of its items.
        with_digests: those that lazy_orbax can compare with digests.
        written_by: who wrote it, as far as that can be told.
        saved_at_s: when it was committed, in seconds since 1970; `None` where nothing says so.
        problem: what is wrong with it, or `None`.
    """

    path: str
    step: int | None
    state: str
    n_bytes: int
    n_files: int
    items: tuple[str, ...]
    with_digests: tuple[str, ...]
    written_by: str
    saved_at_s: float | None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class RunListing(Viewed):
    """What `ls` found.

    Attributes:
        path: what was listed.
        steps: the steps of the run, oldest first; or the checkpoints that are of no run, by name.
        runs: the runs, where the directory is none.
    """

    path: str
    steps: tuple[StepEntry, ...]
    runs: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether each step is what Orbax writes. One that was not published may be that, too."""
        return not any(entry.problem for entry in self.steps)

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        runs = Table((Column("run"),), tuple((run,) for run in self.runs))
        if self.runs and not self.steps:
            return (runs,)
        now_s = time.time()
        rows = tuple(
            (
                str(entry.step if entry.step is not None else entry.path.rpartition("/")[2]),
                entry.state,
                duration_of(max(0, now_s - entry.saved_at_s)) if entry.saved_at_s else "-",
                size_of(entry.n_bytes),
                ", ".join(entry.items) or "-",
                _share(entry),
                entry.written_by,
            )
            for entry in self.steps
        )
        wrong = frozenset(n for n, e in enumerate(self.steps) if e.state != "committed")
        problems = tuple(f"{e.path}: {e.problem}" for e in self.steps if e.problem)
        total = size_of(sum(entry.n_bytes for entry in self.steps))
        summary = f"{counted(len(self.steps), 'step')}, {total}"
        table = Table(_COLUMNS, rows, self.path, wrong)
        lines = (Lines((summary,)), *([Lines(problems, "problem")] if problems else ()))
        return (*([runs] if self.runs else ()), table, *lines)


def _share(entry: StepEntry) -> str:
    if not entry.with_digests:
        return "no"
    return "yes" if set(entry.with_digests) == set(entry.items) else ", ".join(entry.with_digests)


def ls(run: Any) -> RunListing:
    """Lists the steps of a run. It reads no array, and needs neither a model nor a device.

    Args:
        run: a directory with many steps, or its `gs://` address; or one that holds runs, or
            checkpoints that are of no run, which are listed then.

    Raises:
        OptionError: there is neither.
        OSError: the storage refused.
    """
    seen = look(run, (RUN, RUNS))
    if seen.kind == RUNS:
        runs, alone = step_place.runs_and_checkpoints_in(seen.path, seen.names)
        if not runs and not alone:
            look(run, (RUN,))
        checkpoints = [entry_of(path, None, is_temporary=False) for path in alone]
        return RunListing(str(seen.path), tuple(checkpoints), tuple(runs))
    entries = []
    for each in _paths.steps_in(seen.path):
        # A run may go on meanwhile: steps are published and removed.
        with contextlib.suppress(FileNotFoundError):
            if each.path.is_dir():
                entry = entry_of(str(each.path), each.step, is_temporary=each.is_temporary)
                entries.append(entry)
    return RunListing(str(seen.path), tuple(entries))


def entry_of(directory: str, step: int | None, *, is_temporary: bool) -> StepEntry:
    """Returns what is to be seen of a step.

    Args:
        directory: the step's.
        step: its number.
        is_temporary: whether its name says that it is not published.

    Raises:
        FileNotFoundError: it is not there any more.
    """
    problems, sizes, metadata = [], dict[str, int](), dict[str, Any]()
    try:
        sizes = sizes_in(directory)
        metadata = step_metadata(directory)
    except MalformedCheckpointError as error:
        if not place_of(directory).may_be_there():
            raise FileNotFoundError(directory) from error
        if not is_temporary:  # That may be changing at the moment, and nobody reads it.
            problems.append(str(error.problem))
    items = _items_in(directory, sizes)
    state = "committed"
    if problems:
        state = "malformed"
    elif is_temporary:
        state = "temporary"
    elif not place_of(directory).is_committed(sizes):
        state = "torn"
    covered = tuple(n for n, inside in items.items() if _paths.DIGESTS in inside)
    return StepEntry(
        directory,
        step,
        state,
        sum(sizes.values()),
        len(sizes),
        tuple(_paths.published(name) for name in items),
        tuple(_paths.published(name) for name in covered),
        _writer(metadata, is_ours=bool(covered)),
        _seconds(metadata.get("commit_timestamp_nsecs") or metadata.get("init_timestamp_nsecs")),
        "; ".join(problems) or None,
    )


def _items_in(directory: str, sizes: Mapping[str, int]) -> dict[str, set[str]]:
    """Returns what lies in each item of a step. A step without items is one itself."""
    top = {path.partition("/")[0] for path in sizes}
    if step_place.is_item(list(top)):
        return {_paths.published(directory.rstrip("/").rpartition("/")[2]): top}
    found: dict[str, set[str]] = {}
    for path in sizes:
        name, slash, inside = path.partition("/")
        if slash and not name.startswith("."):
            found.setdefault(name, set()).add(inside.partition("/")[0])
    return dict(sorted(found.items()))


def _writer(metadata: Mapping[str, Any], *, is_ours: bool) -> str:
    handlers = metadata.get("item_handlers")
    names = [handlers] if isinstance(handlers, str) else [*(handlers or {}).values()]
    is_v1 = any(".v1." in str(name) for name in names)
    orbax = "Orbax v1" if is_v1 else "Orbax" if names else ""
    if is_ours:
        return f"lazy_orbax, {orbax}" if is_v1 else "lazy_orbax"
    return orbax or "-"


def _seconds(nanoseconds: Any) -> float | None:
    is_number = type(nanoseconds) is int and 0 < nanoseconds < 2**63
    return nanoseconds / 1e9 if is_number else None
