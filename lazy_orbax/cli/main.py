"""The command line: one table of commands, and what each of them has in common."""

from __future__ import annotations

import argparse

from lazy_orbax.cli import verify

_VERBS = {"verify": verify}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 0 if nothing is wrong, else 1.

    Args:
        arguments: those of the command line; `None` takes them from there.
    """
    parser = argparse.ArgumentParser(prog="python -m lazy_orbax")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, verb in _VERBS.items():
        verb.add_arguments(commands.add_parser(name, help=verb.HELP))
    options = parser.parse_args(arguments)
    return _VERBS[options.command].run(options)
