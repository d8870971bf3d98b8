"""Names, sizes and times for people."""

from __future__ import annotations

import pytest

from lazy_orbax.view.blocks import Column, Lines, Node, Row, Spans, Table, Tree
from lazy_orbax.view.text import as_text, duration_of, size_of, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe/層 1", "größe/層 1"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202e\u200b\ud800\x9b", r"\u202e\u200b\ud800\x9b"),
    ],
)
def test_nothing_in_a_text_acts_on_a_terminal(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.25e9, "1.25 GB")]
)
def test_sizes(n_bytes, text):
    assert size_of(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (90, "90 s"), (600, "10 min"), (9000, "2.5 h"), (864_000, "10 days")],
)
def test_times(seconds, text):
    assert duration_of(seconds) == text


def test_blocks_are_lines():
    table = Table((Column("name"), Column("size", is_number=True)), (("a\x1b", "10"), ("b", "9")))
    tree = Tree(Node("root", "2 B", 2, (Node("x", "1 B", 1), Node("y\n", "1 B", 1))))
    spans = Spans(("first", "second"), (Row("s", (1.0, 2.0), "2 s"),))
    text = as_text([Lines(("one", "two")), table, tree, spans])
    assert text.splitlines() == [
        "one",
        "two",
        "name   size",
        "a\\x1b    10",
        "b         9",
        "root  2 B",
        "  x  1 B",
        "  y\\n  1 B",
        "s  ████████████▓▓▓▓▓▓▓▓▓▓▓▓  2 s",
    ]
