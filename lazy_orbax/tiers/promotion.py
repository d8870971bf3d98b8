"""When which tier of a run gets the newest snapshot; a program of its own brings it there.

The keeper has neither JAX nor Orbax, and waits for none of these programs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from lazy_orbax.tiers.completion import end
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.snapshot_file import Snapshot

_LOG = logging.getLogger("lazy_orbax")
_PROGRAM = "lazy_orbax.handlers.promoting"
_Seals = list[tuple[str, int]]


@dataclasses.dataclass
class _Way:
    """The way of a run to one tier.

    Attributes:
        tier: where to, as the trainers told it.
        due_s: when the next snapshot is to go there.
        program: what brings one there, while it runs.
        status: how the last one ended.
        is_owed: whether the run's last trainer has died since a program began.
        taken: what was in memory when that began.
        done: what was in memory when the last one that succeeded began.
    """

    tier: dict[str, Any]
    due_s: float
    program: subprocess.Popen[bytes] | None = None
    status: int | None = None
    is_owed: bool = False
    taken: _Seals | None = None
    done: _Seals | None = None


class Promotions:
    """The tiers of all runs. A tier gets one snapshot at a time, and waits for no other tier."""

    def __init__(self, shelf: Shelf):
        """Begins with no run.

        Args:
            shelf: where the snapshots are.
        """
        self._shelf = shelf
        self._ways: dict[str, list[_Way]] = {}
        self._dead: set[str] = set()

    def came(self, run: str, tiers: Sequence[dict[str, Any]], now_s: float) -> None:
        """Notes that a trainer is there, and what tiers it wants. What is under way goes on.

        Args:
            run: the run.
            tiers: the fields of each `Tier`.
            now_s: the moment.
        """
        known = {way.tier["path"]: way for way in self._ways.get(run, ())}
        ways = [
            known.pop(tier["path"], None) or _Way(tier, now_s + _pause_s(tier)) for tier in tiers
        ]
        for way, tier in zip(ways, tiers, strict=True):
            way.tier, way.due_s = tier, min(way.due_s, now_s + _pause_s(tier))
        for way in known.values():
            _stop(way)
        self._ways[run] = ways

    def left(self, run: str) -> None:
        """Notes that the last trainer of a run has ended well."""
        for way in self._ways.pop(run, ()):
            _stop(way)

    def turn(self, now_s: float, alive: set[str], *, is_late: bool = False) -> bool:
        """Begins what is due. Returns whether anything is under way.

        What nobody is left of is due at once: it may not be there for long.

        Args:
            now_s: the moment.
            alive: runs of which somebody is there.
            is_late: whether what failed is not tried again, because the keeper is about to end.
        """
        for run, ways in self._ways.items():
            has_died = run not in alive and run not in self._dead
            for way in ways:
                way.due_s, way.is_owed = (now_s, True) if has_died else (way.due_s, way.is_owed)
                if way.program is not None and (status := way.program.poll()) is not None:
                    self._ended(run, way, status)
                may_begin = way.is_owed or not is_late
                if way.program is None and now_s >= way.due_s and may_begin:
                    way.due_s, way.is_owed = now_s + _pause_s(way.tier), False
                    self._begin(run, way)
        self._dead = {run for run in self._ways if run not in alive}
        return any(way.program is not None for ways in self._ways.values() for way in ways)

    def _begin(self, run: str, way: _Way) -> None:
        seals = [
            (snapshot.path, snapshot.serial)
            for _, snapshot in self._shelf.snapshots()
            if isinstance(snapshot, Snapshot) and snapshot.facts["run"] == run
        ]
        if seals and seals != way.done:
            try:
                way.taken, way.program = seals, self._started(run, way.tier)
            except OSError as error:  # There is no memory for one more process, perhaps.
                way.status = 1
                _LOG.warning("Nothing brings %s to %s: %s", run, way.tier["path"], error)

    def _started(self, run: str, tier: dict[str, Any]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)  # Perhaps for another device.
        command = [sys.executable, "-m", _PROGRAM, run, self._shelf.path, json.dumps(tier)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)

    def _ended(self, run: str, way: _Way, status: int) -> None:
        way.program, way.status = None, status
        if status == 0:
            way.done = way.taken
        else:
            _LOG.warning("Bringing %s to %s ended with %s.", run, way.tier["path"], status)

    def told(self) -> list[dict[str, Any]]:
        """Returns the tiers of all runs: `is_busy`, and how the last program ended (`status`)."""
        return [
            {"run": run, **way.tier, "is_busy": way.program is not None, "status": way.status}
            for run, ways in self._ways.items()
            for way in ways
        ]

    def close(self) -> None:
        """Stops what is under way: nothing of it is listed, and the next keeper begins anew."""
        for run in list(self._ways):
            self.left(run)


def _pause_s(tier: dict[str, Any]) -> float:
    """Returns when the next snapshot is to go to a tier: on all machines at the same moment."""
    every_s = tier["every_s"]
    return every_s if tier.get("machine") is None else every_s - time.time() % every_s


def _stop(way: _Way) -> None:
    if way.program is not None:
        end(way.program)
        way.program = None
