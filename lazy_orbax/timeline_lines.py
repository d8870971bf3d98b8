"""Timelines in a file beside a run: a line of JSON for each save and restore."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

from lazy_orbax.errors import OptionError
from lazy_orbax.timeline import RestoreTimeline, SaveTimeline

ENDING = ".timeline.jsonl"
"""What the name of such a file ends in: `run.timeline.jsonl` is of the run `run`."""


def timeline_file(path: Any) -> Callable[[SaveTimeline | RestoreTimeline], None]:
    """Returns what appends timelines to a file, for `on_timeline` and `on_restore`.

    `lazy-orbax timeline RUN` and `lazy-orbax html RUN` find a file `RUN.timeline.jsonl` beside the
    run. In a job of several processes each gives a file of its own, such as
    `run.0.timeline.jsonl`.

    Args:
        path: of the file, which is local. It is made if it is not there, and never shortened.

    Raises:
        OptionError: it cannot be written.
    """
    file = os.path.abspath(path)
    _append(file, b"")

    def append(timeline: SaveTimeline | RestoreTimeline) -> None:
        kind = "save" if isinstance(timeline, SaveTimeline) else "restore"
        told = {"kind": kind, "at_s": time.time(), "host": platform.node(), "pid": os.getpid()}
        _append(file, json.dumps(told | vars(timeline), default=str).encode() + b"\n")

    return append


def _append(file: str, line: bytes) -> None:
    """Writes a line at once: so those of two processes are not mixed on a local disk."""
    try:
        with open(file, "ab", buffering=0) as opened:
            opened.write(line)
    except OSError as error:
        raise OptionError(
            f"{file}: timelines cannot be written there ({error.strerror}). Give a local file, "
            "such as run.timeline.jsonl beside the run."
        ) from error
