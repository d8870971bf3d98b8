"""The command line: `python -m lazy_orbax verify PATH`."""

from __future__ import annotations

import argparse
import sys

from lazy_orbax.errors import OptionError
from lazy_orbax.integrity.verify import verify


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 0 if nothing is wrong, else 1.

    Args:
        arguments: those of the command line; `None` takes them from there.
    """
    parser = argparse.ArgumentParser(prog="python -m lazy_orbax")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="compare a checkpoint with its digests")
    command.add_argument("path", nargs="+", help="an item, a step or a run; a directory or gs://")
    status = 0
    for path in parser.parse_args(arguments).path:
        try:
            report = verify(path)
        except OptionError as error:
            sys.stderr.write(f"{error}\n")
            status = 1
            continue
        sys.stdout.write(f"{report}\n")
        status = status if report.ok else 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
