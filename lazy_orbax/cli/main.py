"""The command line: one table of commands, and what each of them has in common."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

from lazy_orbax._machine import without_garbage_collection
from lazy_orbax.errors import LazyOrbaxError, OptionError
from lazy_orbax.view.text import visible

COMMANDS = {
    "ls": "List the steps of a run.",
    "show": "Show the leaves of a checkpoint.",
    "diff": "Compare two checkpoints.",
    "verify": "Compare checkpoints with their digests.",
    "export": "Write a checkpoint as safetensors.",
    "du": "Say what the steps of a run cost.",
    "timeline": "Say where the time of saves went.",
    "html": "Write a page about a run.",
    "bench": "Measure what a storage can do.",
    "merge": "Average checkpoints.",
    "keeper": "List the snapshots in memory, and who keeps them.",
    "clean": "Find, or remove, what killed saves left.",
}
OK, FOUND, USAGE, STORAGE = 0, 1, 2, 3
"""The exit statuses. `examples/guides/cli.md` says what each means."""
_INSTALL = "The command line needs click and rich: pip install click rich"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns its exit status.

    Args:
        arguments: those of the command line; `None` takes them from there.
    """
    try:
        import click
        import rich  # noqa: F401 - It is imported where a terminal shows something.
    except ImportError:
        sys.stderr.write(f"{_INSTALL}\n")
        return USAGE
    if arguments is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Not every terminal has every character.
    try:
        with without_garbage_collection():
            status = int(_group().main(arguments, "lazy-orbax", standalone_mode=False) or OK)
        sys.stdout.flush()
        return status
    except (BrokenPipeError, SystemExit):
        # Whoever reads has seen enough, as `head` has: click exits with 1 then, and for that alone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _say(error.format_message(), USAGE)
    except OptionError as error:
        return _say(error, USAGE)
    except LazyOrbaxError as error:
        return _say(error, FOUND)
    except (OSError, ValueError) as error:
        return _say(error, STORAGE)
    except (KeyboardInterrupt, click.Abort):
        return 130


def _say(error: Exception | str, status: int) -> int:
    text = str(error) or type(error).__name__
    sys.stderr.write("".join(f"{visible(line)}\n" for line in text.splitlines()))
    return status


def _group() -> Any:
    """Returns all commands. Each is imported when it is called: so the others need not be."""
    import click

    class Commands(click.Group):
        """Commands by name."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            """Returns the names, in the order of the table."""
            return list(COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            """Returns a command."""
            if cmd_name not in COMMANDS:
                return None
            return importlib.import_module(f"lazy_orbax.cli.{cmd_name}").command

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            """Writes what each command does, without importing it."""
            with formatter.section("Commands"):
                formatter.write_dl(list(COMMANDS.items()))

    return Commands(
        name="lazy-orbax",
        help="Look at checkpoints, and merge them: local directories, or gs:// addresses.",
        epilog="Exit status: 0 fine, 1 something is wrong or differs, 2 wrong usage, 3 storage.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
