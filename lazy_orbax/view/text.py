"""Names, sizes and times for people; blocks as plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lazy_orbax.view.blocks import Block, Drawing, Lines, Node, Spans, Table, Tree

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_WIDEST = 60
_BAR = 24
_SPANS = "█▓▒░·"


def visible(text: str) -> str:
    """Returns a text in which nothing acts on a terminal: no control, no hidden, no lone code."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def counted(n: int, what: str) -> str:
    """Returns a number of things, such as `1 step` or `2 steps`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def size_of(n_bytes: float) -> str:
    """Returns a number of bytes, such as `1.2 GB`."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    power = min(int(math.log10(n_bytes) / 3), len(_UNITS) - 1)
    return f"{n_bytes / 1000**power:.3g} {_UNITS[power]}"


def duration_of(seconds: float) -> str:
    """Returns a time span, such as `3.2 s` or `5 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for limit, unit, n in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / n:.3g} {unit}"
    return f"{seconds / 86400:.0f} days"


def as_text(blocks: Iterable[Block]) -> str:
    """Returns blocks as lines of text, in which names are escaped."""
    return "\n".join(line for block in blocks for line in _lines(block))


def _lines(block: Block) -> list[str]:
    if isinstance(block, Lines):
        return [visible(line) for line in block.lines]
    if isinstance(block, Drawing):
        return [visible(line) for line in block.lines]
    if isinstance(block, Table):
        return table_lines(block)
    if isinstance(block, Spans):
        return _span_lines(block)
    return _tree_lines(block)


def table_lines(table: Table) -> list[str]:
    """Returns a table in columns that are as wide as what is in them."""
    head = [visible(column.name) for column in table.columns]
    rows = [head, *([visible(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    # One long name must not push all others out of sight.
    widths = [min(width, _WIDEST) for width in widths]
    title = [visible(table.title)] if table.title else []
    return title + [_row(row, table, widths) for row in rows]


def _row(row: Sequence[str], table: Table, widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if column.is_number else cell.ljust(width)
        for cell, column, width in zip(row, table.columns, widths)
    )
    return "  ".join(cells).rstrip()


def _tree_lines(tree: Tree) -> list[str]:
    found: list[str] = []
    pending: list[tuple[int, Node]] = [(0, tree.root)]
    while pending:
        level, node = pending.pop()
        found.append(f"{'  ' * level}{visible(node.name)}  {visible(node.detail)}".rstrip())
        pending += [(level + 1, inner) for inner in reversed(node.inner)]
    return found


def _span_lines(spans: Spans) -> list[str]:
    """Returns bars, one a row, on a scale of their own: each begins where its row begins."""
    lines = [visible(spans.title)] if spans.title else []
    longest = max((row.ends[-1] for row in spans.rows if row.ends), default=0) or 1
    for row in spans.rows:
        bar, drawn = "", 0
        for n, end in enumerate(row.ends):
            upto = round(end / longest * _BAR)
            bar += _SPANS[n % len(_SPANS)] * (upto - drawn)
            drawn = max(drawn, upto)
        lines.append(f"{visible(row.name)}  {bar.ljust(_BAR)}  {visible(row.detail)}".rstrip())
    return lines
