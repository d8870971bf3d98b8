"""What a soak's ledgers say: how often what happened, and what of it must not happen."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarks.soak import ledger as events

# How a process ended. Another ending is a fault of ours.
KILLED = "killed"
ENDINGS = (KILLED, "terminated", "left alone")
# The one that is written, and the one that waits to be noted.
_MOST_IN_FLIGHT = 2
_UNEXPECTED = "failed unexpectedly"
_AGAIN = "not begun, told again of the failure before"
_UNACCOUNTED = "saves without an outcome"
_CUT = "in flight when killed"
_SHOWN = 20


@dataclasses.dataclass
class Counted:
    """What was counted.

    Attributes:
        counts: how often each event happened.
        processes: how often a process ended in each way.
        lost: committed steps that are not there, or cannot be read.
        wrong: steps with other bits than were saved.
        faults: for each other thing that must not happen, how often it did.
        examples: the first events that must not happen.
    """

    counts: collections.Counter[str]
    processes: collections.Counter[str]
    lost: int
    wrong: int
    faults: dict[str, int]
    examples: list[dict[str, Any]]

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.wrong or self.faults)


def counted(ledgers: Iterable[events.Ledger]) -> Counted:
    """Counts what is in all ledgers."""
    counts: collections.Counter[str] = collections.Counter()
    processes: collections.Counter[str] = collections.Counter()
    steps: dict[str, set[tuple[int, int]]] = {events.LOST: set(), events.WRONG: set()}
    bad: list[dict[str, Any]] = []
    for number, ledger in enumerate(ledgers):
        for event in _settled(ledger.read()):
            name = event["event"]
            if name == events.ENDED:
                processes[event["ending"]] += 1
                is_bad = event["ending"] not in ENDINGS
            else:
                counts[name] += event.get("count", 1)
                is_bad = name in (*steps, events.SILENT, _UNEXPECTED, _UNACCOUNTED)
            if name in steps:
                steps[name].add((number, event["step"]))
            counts["bytes"] += event.get("bytes", 0)
            bad += [event] if is_bad else []
    # Each process that was killed may have torn one line.
    torn = max(0, counts[events.TORN] - processes[KILLED])
    faults = {name: counts[name] for name in (events.SILENT, _UNEXPECTED, _UNACCOUNTED)}
    faults |= {name: n for name, n in processes.items() if name not in ENDINGS}
    faults |= {"torn lines that no kill explains": torn}
    return Counted(
        counts=counts,
        processes=processes,
        lost=len(steps[events.LOST]),
        wrong=len(steps[events.WRONG]),
        faults={name: n for name, n in faults.items() if n},
        examples=bad[:_SHOWN],
    )


def _settled(noted: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yields all events, unexpected failures by that name, and the saves without an outcome."""
    in_flight: set[int] = set()
    for event in noted:
        match event["event"]:
            case events.SAVING:
                in_flight.add(event["step"])
            case events.COMMITTED:
                in_flight.discard(event["step"])
            case events.FAILED:
                in_flight.discard(event["step"])
                if not event["expected"]:
                    event = event | {"event": _UNEXPECTED}
                elif event.get("again"):
                    event = event | {"event": _AGAIN}
            case events.ENDED:
                is_cut = event["ending"] == KILLED and len(in_flight) <= _MOST_IN_FLIGHT
                name = _CUT if is_cut else _UNACCOUNTED
                if in_flight:
                    steps = sorted(in_flight)
                    yield {"event": name, "steps": steps, "count": len(steps)}
                in_flight = set()
        yield event
    if in_flight:
        yield {"event": _UNACCOUNTED, "steps": sorted(in_flight), "count": len(in_flight)}
