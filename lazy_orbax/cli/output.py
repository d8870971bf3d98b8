"""What a command writes: JSON, tables for a terminal, and lines for other programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from lazy_orbax.cli.main import FOUND, OK
from lazy_orbax.view.blocks import Block, Lines, Table
from lazy_orbax.view.text import as_text, size_of, visible

# Of more rows nobody looks at the colours, and drawing them takes longer than reading them.
_MOST_ROWS = 500

as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON to read by program.")


def finish(record: Any, *, as_json: bool) -> int:
    """Writes a record. Returns the exit status: whether something is wrong with what it is of.

    Args:
        record: a report.
        as_json: whether to write JSON.
    """
    if as_json:
        write_json(record)
    else:
        write(record.blocks())
    return OK if getattr(record, "ok", True) else FOUND


def write_json(record: Any) -> None:
    """Writes a record as one JSON value, of ASCII alone."""
    sys.stdout.write(json.dumps(plain(record), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Returns a record as JSON values. A number that JSON has no word for becomes its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
        is_fine = getattr(value, "ok", None)
        return fields if is_fine is None else fields | {"ok": is_fine}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write(blocks: tuple[Block, ...]) -> None:
    """Writes blocks: in colours on a terminal, else as lines."""
    if sys.stdout.isatty() and all(_is_short(block) for block in blocks):
        _write_rich(blocks)
    else:
        sys.stdout.write(f"{as_text(blocks)}\n")


def _is_short(block: Block) -> bool:
    return not isinstance(block, Table) or len(block.rows) <= _MOST_ROWS


def _write_rich(blocks: tuple[Block, ...]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text  # A text as it is: rich would read others as markup.

    console = Console(highlight=False, soft_wrap=True)
    for block in blocks:
        if isinstance(block, Table):
            title = Text(visible(block.title), style="bold")
            table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            for column in block.columns:
                justify = "right" if column.is_number else "left"
                table.add_column(Text(visible(column.name)), justify=justify, overflow="fold")
            for n, row in enumerate(block.rows):
                style = "red" if n in block.wrong else ""
                table.add_row(*(Text(visible(cell), style=style) for cell in row))
            console.print(table, soft_wrap=False)
        else:
            is_problem = isinstance(block, Lines) and block.kind == "problem"
            console.print(Text(as_text([block]), style="red" if is_problem else ""))


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives what long work tells its bytes to; a bar with GB/s where a person looks on.

    Args:
        what: what is being done.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
    console, begun_s = Console(stderr=True), time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def tell(done_bytes: int, all_bytes: int) -> None:
            rate = done_bytes / max(time.monotonic() - begun_s, 1e-9)
            text = f"{size_of(done_bytes)}, {rate / 1e9:.2f} GB/s"
            bar.update(task, completed=done_bytes, total=all_bytes, rate=text)

        yield tell
