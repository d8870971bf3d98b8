"""What there is to see: tables, trees, lines, drawings and spans of time, as plain values."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Lines:
    """Sentences.

    Attributes:
        lines: one sentence each.
        kind: `note`, or `problem` where they say what is wrong.
    """

    lines: tuple[str, ...]
    kind: str = "note"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Lines whose characters stand below each other."""

    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head.
        is_number: whether its cells end at one line.
    """

    name: str
    is_number: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, which are texts.

    Attributes:
        columns: one for each cell of a row.
        rows: the cells.
        title: what it is of.
        wrong: numbers of the rows of which something is wrong.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    wrong: frozenset[int] = frozenset()

    def without_empty_columns(self) -> Table:
        """Returns the table without columns in which there is nothing."""
        kept = [n for n, _ in enumerate(self.columns) if any(row[n] for row in self.rows)]
        rows = tuple(tuple(row[n] for n in kept) for row in self.rows)
        columns = tuple(self.columns[n] for n in kept)
        return dataclasses.replace(self, columns=columns, rows=rows)


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a tree.

    Attributes:
        name: of the node.
        detail: what else is to be said of it.
        n_bytes: of it and all below it.
        inner: the nodes below it.
    """

    name: str
    detail: str = ""
    n_bytes: int = 0
    inner: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree of sizes."""

    root: Node


@dataclasses.dataclass(frozen=True)
class Row:
    """What happened one after the other, from a moment of its own.

    Attributes:
        name: of what it happened to.
        ends: when each part ended, in seconds since the first began.
        detail: what else is to be said.
    """

    name: str
    ends: tuple[float, ...]
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Spans:
    """Rows of spans of time.

    Attributes:
        parts: what each span of a row is called.
        rows: the rows.
        title: what they are of.
    """

    parts: tuple[str, ...]
    rows: tuple[Row, ...]
    title: str = ""


Block = Lines | Drawing | Table | Tree | Spans
