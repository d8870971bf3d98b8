"""What a process said, as samples for the records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.record import Sample

PART = "restore"
# Metric, what it is made from, unit. Each restore has these.
_EACH = (
    ("", lambda said: said["ended_s"] - said["began_s"], "s"),
    ("_cpu", lambda said: said["cpu_s"], "s"),
    ("_cached", lambda said: said["cached_bytes"], "bytes"),
)
# Later ones take memory that the process has kept.
_FIRST = (
    ("peak_above", lambda said: said["peak_bytes"] - said["state_bytes"], "bytes"),
    ("peak", lambda said: said["peak_bytes"], "bytes"),
    ("peak_by_kernel", lambda said: int(said["kernel_peak"]), ""),
    ("state", lambda said: said["state_bytes"], "bytes"),
)
_FILES = (
    ("from_storage", lambda said: said["read_bytes"], "bytes"),
    ("asked", lambda said: said["asked_bytes"], "bytes"),
    ("read_calls", lambda said: said["read_calls"], "calls"),
)
_BUCKET = (
    ("requests", lambda said: said["requests"], "requests"),
    ("round_trips", lambda said: said["round_trips"], "requests"),
    ("answered", lambda said: said["answered_bytes"], "bytes"),
)
# Of fields of lazy_orbax's reports: the house puts units into names.
_UNITS = {"_s": "s", "_bytes": "bytes"}


def samples_of(
    row: str, peer: str, found: list[dict[str, Any]], *, load: float
) -> Iterator[Sample]:
    """Yields what the restores of one process are worth.

    Args:
        row: the name of the comparison.
        peer: who restored.
        found: for each restore the fields of `measure.Measured`, and what else is known of it.
        load: of the machine, before.
    """

    def sample(metric: str, value: float | None, unit: str, trace: Any = None) -> Sample:
        return Sample(
            part=PART, workload=row, peer=peer, metric=metric, value=value, unit=unit, trace=trace
        )

    first = found[0]
    yield sample("load", load, "")
    for metric, value, unit in _FIRST + (_BUCKET if "requests" in first else _FILES):
        yield sample(metric, value(first), unit)
    for name, said in zip(("first", "second"), found):
        for metric, value, unit in _EACH:
            yield sample(f"{name}{metric}", value(said), unit)
    if "requests" in first:
        yield sample("kinds", None, "text", first["kinds"])
    report = first.get("report")
    if report:
        yield sample("report", None, "text", report)
        for name, value in report.items():
            if isinstance(value, int | float):
                unit = next((u for end, u in _UNITS.items() if name.endswith(end)), "")
                yield sample(f"report_{name}", value, unit)
