"""`verify PATH...`: compares checkpoints with their digests."""

from __future__ import annotations

import argparse
import sys

from lazy_orbax.errors import OptionError
from lazy_orbax.integrity.verify import verify

HELP = "compare a checkpoint with its digests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the command takes."""
    parser.add_argument("path", nargs="+", help="an item, a step or a run; a directory or gs://")


def run(options: argparse.Namespace) -> int:
    """Writes a report for each path. Returns 0 if all of them are whole, else 1."""
    status = 0
    for path in options.path:
        try:
            report = verify(path)
        except OptionError as error:
            sys.stderr.write(f"{error}\n")
            status = 1
            continue
        sys.stdout.write(f"{report}\n")
        status = status if report.ok else 1
    return status
