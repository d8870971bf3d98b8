"""Records: one JSON line per part, workload, peer and metric, with every repeat in it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

import lazy_orbax

_PACKAGES = {"jax": "jax", "orbax": "orbax-checkpoint", "tensorstore": "tensorstore"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One value of one repeat.

    Attributes:
        part: `stall`, `throughput`, `memory`, `scale` or `gpu`.
        workload: the state, and the kind of step where there are steps: `many_small/idle`.
        peer: who saved; see `peers.py`. Ceilings are peers of their own, `raw`.
        metric: what was measured.
        value: the value; `None` for a trace.
        unit: of the value: `s`, `bytes`, `bytes/s`, `ratio`, `text`.
        trace: for plots: `[[start_s, duration_s], ...]` or a mapping of moments.
    """

    part: str
    workload: str
    peer: str
    metric: str
    value: float | str | None
    unit: str
    trace: Any = None


def as_records(samples: Iterable[Sample], context: dict[str, Any]) -> list[dict[str, Any]]:
    """Gathers samples that differ in their value only. `context` goes into each record."""
    gathered: dict[tuple[str, ...], list[Sample]] = {}
    for s in samples:
        gathered.setdefault((s.part, s.workload, s.peer, s.metric, s.unit), []).append(s)
    records = []
    for (part, workload, peer, metric, unit), group in gathered.items():
        values = [s.value for s in group]
        numbers = [v for v in values if isinstance(v, int | float)]
        records.append(
            {
                "part": part,
                "workload": workload,
                "peer": peer,
                "metric": metric,
                "unit": unit,
                "values": values,
                "median": statistics.median(numbers) if numbers else None,
                "min": min(numbers, default=None),
                "max": max(numbers, default=None),
                # One trace is enough for a plot.
                "trace": next((s.trace for s in reversed(group) if s.trace is not None), None),
                **context,
            }
        )
    return records


def append(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(package) for name, package in _PACKAGES.items()}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=pathlib.Path(lazy_orbax.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    found["lazy_orbax"] = f"{lazy_orbax.__version__}+{commit}" if commit else lazy_orbax.__version__
    return found | {"python": platform.python_version()}


def hardware(directory: pathlib.Path, accelerator: str) -> dict[str, Any]:
    """Describes the machine that the benchmark runs on and the disk that it writes to."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": file_system_of(directory),
        "accelerator": accelerator,
    }


def _cpu_model() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def file_system_of(directory: pathlib.Path) -> str:
    """Returns the type of the file system that holds `directory`, such as `ext4`."""
    mounts = pathlib.Path("/proc/mounts")
    found = ("", "unknown")
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        _, place, kind, *_ = line.split()
        if directory.resolve().is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]
