"""Makes the tables of restores from their records.

python -m benchmarks.restore.table benchmarks/results/restore.jsonl
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks import record
from benchmarks.restore import goals
from benchmarks.restore.cases import PEERS, RAW, STOCK
from benchmarks.restore.samples import PART
from benchmarks.tables import (
    Records,
    cell,
    machines,
    markdown,
    peer_title,
    quantity,
    ratio,
    workloads_of,
)

METRICS = {
    "first": "first restore of the process",
    "first_cpu": "first restore, CPU seconds",
    "second": "second restore of the process",
    "second_cpu": "second restore, CPU seconds",
    "peak_above": "peak of resident memory above the state",
    "state": "the state in memory",
    "from_storage": "bytes that storage delivered",
    "asked": "bytes asked for",
    "read_calls": "calls that read",
    "requests": "requests to the bucket",
    "round_trips": "requests that waited for one another, estimated",
    "answered": "bytes that the bucket sent",
}
_SAMPLED = " Some peaks were sampled: here the kernel may not be told to forget the last one."
_AGAINST_RAW = {"first", "first_cpu", "second", "second_cpu"}
_NO_RATIO = {"state"}


def by_key(found: Iterable[dict[str, Any]]) -> Records:
    """Returns records as the tables take them. The last one of several counts."""
    return {(f["part"], f["workload"], f["peer"], f["metric"]): f for f in found}


def section(records: Records) -> str:
    """All tables: the goals, then each metric with a row for each comparison."""
    parts = [machines(records, PART), _circumstances(records)]
    goal_table = goals.table(records, PART)
    parts += [f"**goals**, of medians\n\n{goal_table}"] if "|" in goal_table else []
    for metric, what in METRICS.items():
        table = _table(records, metric)
        parts += [f"**{what}**\n\n{table}"] if table else []
    reports = _reports(records)
    return "\n".join([*parts, *([f"**what lazy reports**\n\n{reports}"] if reports else [])])


def _circumstances(records: Records) -> str:
    """How busy the machine was, and whether all files were out of the page cache."""
    loads, cached, repeats, by_kernel = [], [], [], []
    for (part, _, _, metric), found in records.items():
        if part == PART and metric == "load":
            loads += found["values"]
            repeats.append(len(found["values"]))
        elif part == PART and metric in ("first_cached", "second_cached"):
            cached += found["values"]
        elif part == PART and metric == "peak_by_kernel":
            by_kernel += found["values"]
    if not loads:
        return ""
    span = (
        f"{min(repeats)}" if min(repeats) == max(repeats) else f"{min(repeats)} to {max(repeats)}"
    )
    return (
        f"Medians of {span} repeats, the range in brackets. Load of the machine before each: "
        f"{min(loads):.1f} to {max(loads):.1f}. Still in the page cache, at most: "
        f"{quantity(max(cached, default=0), 'bytes')}.{'' if all(by_kernel) else _SAMPLED}\n"
    )


def _table(records: Records, metric: str) -> str:
    """One metric: a column for each peer, and ratios. Empty if nobody has it."""
    rows = workloads_of(records, PART)
    peers = [p for p in PEERS if any((PART, row, p, metric) in records for row in rows)]
    if not peers:
        return ""
    against = (
        [p for p in STOCK if p in peers] if "lazy" in peers and metric not in _NO_RATIO else []
    )
    raw = [p for p in RAW if p in peers] if against and metric in _AGAINST_RAW else []
    header = ["", *map(peer_title, peers), *(f"lazy vs {peer_title(p)}" for p in against)]
    lines = []
    for row in rows:
        found = {p: records.get((PART, row, p, metric)) for p in peers}
        if any(found.values()):
            cells = [ratio(found["lazy"], found[p]) for p in against]
            cells += [_times(found["lazy"], [found[p] for p in raw])] if raw else []
            lines.append([row, *map(cell, found.values()), *cells])
    return markdown([*header, *(["lazy vs the fastest plain read"] if raw else [])], lines)


def _times(ours: dict[str, Any] | None, others: list[dict[str, Any] | None]) -> str:
    medians = [other["median"] for other in others if other is not None]
    if ours is None or not medians or min(medians) <= 0:
        return ""
    return f"{ours['median'] / min(medians):.2f}x"


def _reports(records: Records) -> str:
    """What lazy_orbax's reports say, where it makes any."""
    lines = [
        [row, peer_title(peer), metric.removeprefix("report_").replace("_", " "), cell(found)]
        for (part, row, peer, metric), found in records.items()
        if part == PART and metric.startswith("report_")
    ]
    return markdown(["restored", "by", "field", ""], lines) if lines else ""


def main() -> None:
    print(
        section(by_key(found for path in sys.argv[1:] for found in record.read(pathlib.Path(path))))
    )


if __name__ == "__main__":
    main()
