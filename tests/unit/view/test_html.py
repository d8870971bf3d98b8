"""Pages: what is in them, and that no name acts in them."""

from __future__ import annotations

import html.parser

import pytest
from equipment.runs import EVIL

from lazy_orbax.view.blocks import Column, Drawing, Lines, Node, Row, Spans, Table, Tree
from lazy_orbax.view.html import as_html, as_page
from lazy_orbax.view.viewed import Viewed


class Parsed(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


BLOCKS = {
    "lines": Lines((EVIL,), "problem"),
    "drawing": Drawing((EVIL,)),
    "table": Table((Column(EVIL),), ((EVIL,),), EVIL, frozenset({0})),
    "tree": Tree(Node(EVIL, EVIL, 2, (Node(EVIL, EVIL, 1), Node("x", "", 1, (Node("y"),))))),
    "spans": Spans((EVIL,), (Row(EVIL, (1.0,), EVIL),), EVIL),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_names_do_nothing_on_a_page(block):
    for page in (as_html([BLOCKS[block]]), as_page(EVIL, [(EVIL, [BLOCKS[block]])])):
        found = Parsed(page)
        assert found.open == []
        assert "script" not in found.tags
        assert "<script>alert(1)</script>" in found.text
        assert "\x1b" not in page
        assert not [
            name for name, _ in found.attributes if name in ("src", "href") or name[:2] == "on"
        ]


def test_a_page_is_whole_and_loads_nothing():
    found = Parsed(as_page("run", [("steps", list(BLOCKS.values()))]))
    assert found.tags.count("style") == 1
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert "url(" not in found.text


def test_a_tree_folds_and_its_bars_are_shares():
    small = Tree(Node("root", "", 4, (Node("a", "", 3, (Node("b", "", 3),)), Node("c", "", 1))))
    page = as_html([small])
    assert page.count("<details open>") == 2
    for width in ("100.0%", "75.0%", "25.0%"):
        assert f"width:{width}" in page
    many = Tree(Node("root", "", 1, (Node("a", "", 1, tuple(Node(str(n)) for n in range(300))),)))
    assert as_html([many]).count("<details open>") == 1


def test_a_tree_may_be_as_deep_as_a_checkpoint_says():
    node = Node("leaf")
    for _ in range(20_000):
        node = Node("k", inner=(node,))
    assert as_html([Tree(node)]).count("</details>") == 20_000


def test_a_record_is_seen_as_text_and_as_html():
    class Record(Viewed):
        def blocks(self):
            return (Lines(("one <b>",)),)

    assert str(Record()) == "one <b>"
    assert "one &lt;b&gt;" in Record()._repr_html_()
