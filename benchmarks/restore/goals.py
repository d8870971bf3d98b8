"""What restores are to reach, and whether they do."""

from __future__ import annotations

import dataclasses
import fnmatch

from benchmarks.restore.cases import RAW, STOCK, TRANSFORMED
from benchmarks.tables import Records, markdown, quantity

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound of lazy_orbax's medians.

    Attributes:
        rows: the comparisons it is for, as patterns of their names.
        metric: what is compared.
        times: at most so many times the least of the medians of `others`.
        others: peers.
        most: or at most this value, by itself.
        peer: whose medians they are.
    """

    rows: tuple[str, ...]
    metric: str
    times: float = 0.0
    others: tuple[str, ...] = ("stock_default",)
    most: float | None = None
    peer: str = "lazy"

    def text(self, unit: str) -> str:
        if self.most is not None:
            return (
                f"at most {self.most / _MIB:.0f} MiB"
                if unit == "bytes"
                else f"at most {self.most:g}"
            )
        others = {
            STOCK: "stock, the better",
            RAW: "the fastest plain read",
            ("raw_4",): "a plain read by 4 threads",
            ("lazy",): "the restore as it was saved",
        }
        what = others.get(self.others, "stock default")
        if self.times < 1:
            return f"at most 1/{1 / self.times:.3g} of {what}"
        return f"at most {self.times:g}x {what}"


GOALS = (
    Goal(("small",), "first", 1 / 8),
    Goal(("small",), "first_cpu", 1 / 10),
    Goal(("small",), "first", 1.5, ("raw_4",)),
    Goal(("many5k",), "first", 1 / 14),
    Goal(("many20k",), "first", 1 / 24),
    Goal(("large",), "first", 1 / 1.5),
    Goal(("large",), "first_cpu", 1 / 4),
    Goal(("large",), "first", 1.05, RAW),
    Goal(("resharded/*", "cast"), "first", 1 / 6),
    Goal(("resharded_large/*", "cast_large", "stock_zstd_large"), "first", 1.0, STOCK),
    Goal(("stock_zstd",), "first", 1 / 4),
    Goal(("transformed",), "first", 1.2, ("lazy",), peer=TRANSFORMED),
    Goal(("gs/*",), "first", 0.4),
    Goal(("gs/*",), "requests", 1.0),
    Goal(("gs/*",), "round_trips", most=8),
    Goal(("small", "large", "resharded*", "cast*"), "peak_above", most=64 * _MIB),
    Goal(("many5k", "many20k"), "peak_above", 1 / 3),
)


def table(records: Records, part: str) -> str:
    """A line for each goal of each comparison that was measured; what was missed is bold."""
    names = dict.fromkeys(workload for found, workload, _, _ in records if found == part)
    lines = []
    for goal in GOALS:
        for row in names:
            if any(fnmatch.fnmatchcase(row, pattern) for pattern in goal.rows):
                line = _line(records, part, row, goal)
                lines += [line] if line else []
    return markdown(
        [
            "restored",
            "measured",
            "goal",
            "lazy",
            "the other",
            "times",
            "",
        ],
        lines,
    )


def _line(records: Records, part: str, row: str, goal: Goal) -> list[str] | None:
    """Returns the cells, or nothing where one side was not measured."""
    medians = {
        peer: (found["median"], found["unit"])
        for peer in (goal.peer, *goal.others)
        if (found := records.get((part, row, peer, goal.metric))) is not None
    }
    if goal.peer not in medians:
        return None
    ours, unit = medians.pop(goal.peer)
    what = [row, goal.metric.replace("_", " "), goal.text(unit), quantity(ours, unit)]
    if goal.most is not None:
        return [*what, "", "", "met" if ours <= goal.most else "**missed**"]
    if not medians:
        return None
    theirs = min(value for value, _ in medians.values())
    factor = f"{ours / theirs:.2f}" if theirs > 0 else ""
    met = ours <= goal.times * theirs
    return [*what, quantity(theirs, unit), factor, "met" if met else "**missed**"]
