"""Where the time of saves and restores went, from the file of timelines beside a run."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError, OptionError
from lazy_orbax.timeline_lines import ENDING
from lazy_orbax.trust.bounded_json import parse_json
from lazy_orbax.view import moments
from lazy_orbax.view.blocks import Block, Lines
from lazy_orbax.view.viewed import Viewed

# A line has some hundred bytes, more where transforms report on leaves.
_MOST_LINE_BYTES = 2**22
_MOST_ENTRIES = 200_000
_KINDS = {"save": moments.SAVE, "restore": moments.RESTORE}


@dataclasses.dataclass(frozen=True)
class TimelineEntry:
    """A save or a restore of an item, as one process saw it.

    Attributes:
        kind: `save` or `restore`.
        item: the item's directory.
        step: its step, where the path tells it.
        began_s: when it began, in seconds since 1970.
        moments: its moments by name, in seconds since it began; `None` where one did not come.
        n_bytes: bytes that were written, or read.
        mode: in which way it was copied; empty for a restore.
        error: why it failed, or `None`.
        process: the host and the number of the process.
    """

    kind: str
    item: str
    step: int | None
    began_s: float
    moments: dict[str, float | None]
    n_bytes: int
    mode: str
    error: str | None
    process: str


@dataclasses.dataclass(frozen=True)
class RunTimeline(Viewed):
    """What `timeline` found.

    Attributes:
        files: those that were read.
        entries: what is in them, as it began.
        n_unreadable: lines that are none of ours, such as one that was cut off by a kill.
    """

    files: tuple[str, ...]
    entries: tuple[TimelineEntry, ...]
    n_unreadable: int

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        shown: list[Block] = []
        for kind, parts in _KINDS.items():
            rows = [
                moments.row_of(_name(each), each.moments, each.n_bytes, each.error)
                for each in self.entries
                if each.kind == kind
            ]
            if rows:
                shown.append(moments.spans_of(f"{kind}s: {', '.join(parts)}", rows, parts))
        files = ", ".join(self.files)
        unread = f", {self.n_unreadable} lines cannot be read" if self.n_unreadable else ""
        return (*shown, Lines((f"{len(self.entries)} timelines in {files}{unread}",)))

    def trace(self) -> dict[str, Any]:
        """Returns a trace that Perfetto and chrome://tracing show, as JSON values."""
        return {"displayTimeUnit": "ms", "traceEvents": list(_events(self.entries))}


def _name(entry: TimelineEntry) -> str:
    if entry.step is None:
        return entry.item.rstrip("/").rpartition("/")[2]
    return f"step {entry.step}"


def timeline(path: Any) -> RunTimeline:
    """Reads the timelines that `lazy_orbax.timeline_file` wrote.

    Args:
        path: a run, beside which lies `RUN.timeline.jsonl`, or several such as
            `RUN.0.timeline.jsonl`; or one such file.

    Raises:
        OptionError: there is no such file.
        OSError: it cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"Give a path: found {path!r}.")
    files = files_of(os.fspath(path))
    if not files:
        wanted = os.fspath(path).rstrip("/") + ENDING
        raise OptionError(
            f"There is no {wanted}. Save with LazyOptions(on_timeline=lazy_orbax.timeline_file("
            f"{wanted!r})), or give the file."
        )
    entries, n_unreadable = list[TimelineEntry](), 0
    for file in files:
        for entry in _entries(file):
            if entry is None:
                n_unreadable += 1
            else:
                entries.append(entry)
    entries.sort(key=lambda entry: entry.began_s)
    return RunTimeline(tuple(files), tuple(entries), n_unreadable)


def files_of(path: str) -> list[str]:
    """Returns the files of timelines of a run, or the one that was given; none may be there."""
    if os.path.isfile(path):
        return [path]
    run = path.rstrip("/")
    found = {f"{run}{ENDING}", *glob.glob(f"{glob.escape(run)}.*{ENDING}")}
    return sorted(filter(os.path.isfile, found))


def _entries(file: str) -> Iterator[TimelineEntry | None]:
    with open(file, "rb") as opened:
        for _ in range(_MOST_ENTRIES):
            line = opened.readline(_MOST_LINE_BYTES)
            if not line:
                return
            try:
                yield _entry(parse_json(line, file))
            except (MalformedCheckpointError, KeyError, TypeError, ValueError, OverflowError):
                yield None


def _entry(told: dict[str, Any]) -> TimelineEntry:
    """Makes an entry of a line, whose values may be anything.

    Raises:
        KeyError: something is missing.
        ValueError: something is no number where one is wanted.
    """
    kind = told["kind"]
    at = {part: _seconds(told.get(field)) for part, field in _KINDS[kind].items()}
    step = told.get("step")
    error = told.get("error")
    n_bytes = told["bytes_written" if kind == "save" else "bytes_read"]
    took_s = max((moment for moment in at.values() if moment is not None), default=0.0)
    return TimelineEntry(
        kind=kind,
        item=str(told["directory"]),
        step=step if type(step) is int else None,
        began_s=(_seconds(told["at_s"]) or 0.0) - took_s,
        moments=at,
        n_bytes=int(n_bytes),
        mode=str(told.get("mode", "")),
        error=None if error is None else str(error),
        process=f"{told.get('host', '')} {told.get('pid', '')}",
    )


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"no time: {value!r}")
    return float(value)


def _events(entries: tuple[TimelineEntry, ...]) -> Iterator[dict[str, Any]]:
    """Yields the events of a trace. What overlaps lies in lanes of its own."""
    first_s = min((entry.began_s for entry in entries), default=0.0)
    processes: dict[str, int] = {}
    free: dict[tuple[int, str], list[float]] = {}
    for entry in entries:
        number = processes.setdefault(entry.process, len(processes) + 1)
        ends = moments.ends_of(entry.moments)
        begin_s, end_s = entry.began_s - first_s, entry.began_s - first_s + ends[-1]
        lanes = free.setdefault((number, entry.kind), [])
        lane = next((n for n, until_s in enumerate(lanes) if until_s <= begin_s), len(lanes))
        lanes[lane : lane + 1] = [end_s]
        # Restores lie below the saves.
        where = {"pid": number, "tid": lane + 1 + 100 * (entry.kind == "restore")}
        about = {"item": entry.item, "bytes": entry.n_bytes, "mode": entry.mode}
        about |= {"error": entry.error} if entry.error else {}
        yield _span(f"{entry.kind} {_name(entry)}", begin_s, ends[-1], where, about)
        for part, after, until in zip(entry.moments, (0.0, *ends), ends):
            if until > after:
                yield _span(f"until {part}", begin_s + after, until - after, where, {})
    for process, number in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": process}}


def _span(
    name: str, begin_s: float, took_s: float, where: dict[str, int], about: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": round(1e6 * begin_s, 3), "dur": round(1e6 * took_s, 3)}
    return {"ph": "X", "name": name, "cat": "lazy_orbax", **times, **where, "args": about}


def write_trace(found: RunTimeline, file: Any) -> None:
    """Writes a trace.

    Args:
        found: the timelines.
        file: where to.
    """
    with open(file, "w", encoding="ascii") as opened:
        json.dump(found.trace(), opened)


def write_picture(found: RunTimeline, file: Any) -> None:
    """Draws the saves, one below the other, as a PNG.

    Args:
        found: the timelines.
        file: where to.

    Raises:
        OptionError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("A picture needs matplotlib: pip install matplotlib") from error
    saves = [entry for entry in found.entries if entry.kind == "save"]
    if not saves:
        raise OptionError("There is no save to draw.")
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(saves)), layout="constrained")
    axes = figure.subplots()
    for n, part in enumerate(moments.SAVE):
        ends = [moments.ends_of(entry.moments) for entry in saves]
        begins = [each[n - 1] if n else 0.0 for each in ends]
        widths = [each[n] - begin for each, begin in zip(ends, begins)]
        axes.barh(range(len(saves)), widths, left=begins, label=f"until {part}")
    axes.set_yticks(range(len(saves)), [_name(entry) for entry in saves])
    axes.invert_yaxis()
    axes.set_xlabel("seconds since save() was entered")
    axes.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=150)
