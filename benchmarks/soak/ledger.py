"""What the processes of a soak note, where no fault reaches it."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

# Of a save. A process that was killed leaves some without an outcome.
SAVING, COMMITTED, FAILED = "saving", "committed", "failed"
# Of a step that must be there, or that is listed.
RESTORED, LOST, WRONG, HALF_RETIRED = "restored", "lost", "wrong", "half retired"
# Of a step of which a byte was changed.
DETECTED, HARMLESS, SILENT = "flip detected", "flip harmless", "flip silent"
# Of a process, noted by the supervisor.
ENDED = "ended"
# A process was killed while it wrote a line.
TORN = "torn line"


class Ledger:
    """An append-only file of what is known; each line is on the disk before anything else happens.

    It lies outside of what is killed, filled and spoiled. One process at a time writes to it.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path

    def note(self, event: str, **fields: Any) -> None:
        with self._path.open("a+b") as file:
            line = json.dumps({"event": event, **fields}).encode() + b"\n"
            # A process that was killed may have left half a line: it must not take this one along.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Returns all events; a line that was not written to its end is a `TORN` one."""
        if not self._path.exists():
            return []
        return [_event(line) for line in self._path.read_text().splitlines()]


def _event(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {"event": TORN, "line": line}
