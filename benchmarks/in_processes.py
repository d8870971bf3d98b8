"""What benchmarks share whose samples are processes of their own: their options and records."""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.record import append, hardware, versions


def parser_of(doc: str | None, *, repeats: int = 5) -> argparse.ArgumentParser:
    """Returns a parser of the options that all of them have."""
    parser = argparse.ArgumentParser(description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--directory", default=None)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines; appended to")
    return parser


def sample_of(module: str, *arguments: str) -> dict[str, float]:
    """Runs a module of `benchmarks` in a process of its own. Returns the JSON of its last line.

    Raises:
        RuntimeError: it failed. The message is what it wrote to its standard error.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def tell(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints a record, and writes it where it is wanted, with the machine and the versions."""
    print(json.dumps(record), flush=True)
    if arguments.out:
        place = pathlib.Path(arguments.directory or tempfile.gettempdir())
        context = {"versions": versions(), "hardware": hardware(place, "cpu")}
        append(arguments.out, [{**record, **context}])
