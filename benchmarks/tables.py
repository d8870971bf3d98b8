"""How records are shown: quantities with their range, ratios, tables, the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

Records = dict[tuple[str, str, str, str], dict[str, Any]]
"""By part, workload, peer and metric. The last one of several counts."""

_SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def _scale(value: float, unit: str) -> tuple[float, str]:
    """The factor and the name of the unit that suits the size of a value."""
    prefixes = {"s": _SECONDS, "bytes": _BYTES, "bytes/s": _BYTES}.get(unit, ((1, ""),))
    factor, name = next((p for p in prefixes if abs(value) >= p[0]), prefixes[-1])
    return factor, name + "/s" * unit.endswith("/s")


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def quantity(value: float, unit: str) -> str:
    """Formats a value with three digits and the unit that suits its size."""
    factor, name = _scale(value, unit)
    return f"{_digits(value / factor)} {name}".strip()


def cell(found: dict[str, Any] | None) -> str:
    """The median, and the range in brackets."""
    if found is None:
        return ""
    if found["median"] is None:
        return ", ".join(sorted({str(value) for value in found["values"]}))
    text = quantity(found["median"], found["unit"])
    if found["min"] == found["max"]:
        return text
    factor, _ = _scale(found["median"], found["unit"])
    return f"{text} ({_digits(found['min'] / factor)} to {_digits(found['max'] / factor)})"


def ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    """How much less we take, or more: losses are printed in bold."""
    if ours is None or theirs is None or ours["median"] is None or theirs["median"] is None:
        return ""
    if theirs["median"] <= 0:
        return "both within noise" if ours["median"] <= theirs["max"] else "**more**"
    if ours["median"] <= 0:
        return "within noise of 0"
    factor = theirs["median"] / ours["median"]
    return f"{factor:.1f}x less" if factor >= 1 else f"**{1 / factor:.1f}x more**"


def peer_title(peer: str) -> str:
    return {"none": "no checkpoint"}.get(peer, peer.replace("_", " "))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def workloads_of(records: Records, part: str) -> list[str]:
    return list(dict.fromkeys(w for found, w, _, _ in records if found == part))


def _machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    hardware = found["hardware"]
    return (
        f"Measured {found['time']} at size {found['size']} on {hardware['cpu']}, "
        f"{hardware['cores']} cores, {quantity(hardware['memory_bytes'], 'bytes')} of memory, "
        f"{hardware['file_system']}, accelerator {hardware['accelerator']}; {versions}.\n"
    )


def machines(records: Records, part: str) -> str:
    """What a part was measured with: once, unless its workloads are of several runs."""
    runs: dict[str, dict[str, Any]] = {}
    for (found_part, workload, _, _), found in records.items():
        if found_part == part:
            key = json.dumps([found["versions"], found["hardware"], found["size"]])
            runs.setdefault(key, {})[workload] = found
    names = [f"{', '.join(run)}: " if len(runs) > 1 else "" for run in runs.values()]
    lines = [_machine(list(run.values())[-1]) for run in runs.values()]
    return "\n".join(map("".join, zip(names, lines)))
