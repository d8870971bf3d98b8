"""Moments, which come one after the other, as spans of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazy_orbax.view.blocks import Row, Spans
from lazy_orbax.view.text import duration_of, size_of

SAVE = {
    "planned": "planned_s",
    "enqueued": "enqueued_s",
    "staged": "staged_s",
    "durable": "durable_s",
    "committed": "committed_s",
}
"""The moments of a save, and the fields of a `SaveTimeline` that have them."""
RESTORE = {
    "planned": "planned_s",
    "first byte": "first_byte_s",
    "read": "read_s",
    "on device": "on_device_s",
    "verified": "verified_s",
}
"""The moments of a restore, and the fields of a `RestoreTimeline` that have them."""


def ends_of(moments: Mapping[str, float | None]) -> tuple[float, ...]:
    """Returns when each part ended. One that never came takes no time."""
    ends: list[float] = []
    for moment in moments.values():
        ends.append(max(moment or 0.0, ends[-1] if ends else 0.0))
    return tuple(ends)


def row_of(name: str, moments: Mapping[str, float | None], n_bytes: int, error: Any) -> Row:
    """Returns a row of spans.

    Args:
        name: of what was saved or restored.
        moments: seconds from the beginning to each.
        n_bytes: how much was written or read.
        error: why it failed, or `None`.
    """
    ends = ends_of(moments)
    if error is not None:
        return Row(name, ends, f"failed: {error}")
    told = [f"{part} {duration_of(at)}" for part, at in moments.items() if at is not None]
    return Row(name, ends, ", ".join([size_of(n_bytes), *told]))


def spans_of(title: str, rows: Sequence[Row], parts: Mapping[str, str]) -> Spans:
    """Returns rows under a title, with the names of their parts."""
    return Spans(tuple(parts), tuple(rows), title)
