"""Blocks as HTML: parts for a notebook, or one page that needs no network and no script."""

from __future__ import annotations

import html
from collections.abc import Iterable

from lazy_orbax.view.blocks import Block, Drawing, Lines, Node, Spans, Table, Tree
from lazy_orbax.view.text import visible

# An open tree of more rows is slow to scroll, and shows nothing at a glance.
_MOST_OPEN = 200
_COLORS = ("#9d755d", "#e45756", "#f2cf5b", "#72b7b2", "#4c78a8")
_STYLE = """
.lazy-orbax{font:14px/1.45 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:76rem}
.lazy-orbax table{border-collapse:collapse;margin:.5rem 0}
.lazy-orbax caption{text-align:left;font-weight:600;padding:.3rem 0}
.lazy-orbax th,.lazy-orbax td{padding:.15rem .8rem .15rem 0;text-align:left;
border-bottom:1px solid #e4e7eb;white-space:nowrap}
.lazy-orbax td.d{white-space:normal;border:0}
.lazy-orbax .n{text-align:right;font-variant-numeric:tabular-nums}
.lazy-orbax .wrong,.lazy-orbax .problem{color:#b3261e}
.lazy-orbax pre{line-height:1.1;font-size:12px}
.lazy-orbax details{margin-left:1.1rem}
.lazy-orbax .leaf{padding-left:.95rem}
.lazy-orbax summary{cursor:pointer;margin-left:-1.1rem}
.lazy-orbax .d{color:#57606a;margin-left:.6rem}
.lazy-orbax .bar{display:inline-block;width:7rem;height:.6rem;background:#edf0f3;
margin-right:.6rem;vertical-align:middle}
.lazy-orbax .bar i{display:block;height:100%;background:#4c78a8}
.lazy-orbax .spans{display:inline-flex;width:24rem;height:.8rem;background:#edf0f3}
.lazy-orbax .spans i{display:block;height:100%}
.lazy-orbax .key i{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 .9rem}
"""


def as_html(blocks: Iterable[Block]) -> str:
    """Returns blocks as a part of a page, with its own style."""
    inside = "\n".join(map(_html_of, blocks))
    return f'<style>{_STYLE}</style>\n<div class="lazy-orbax">\n{inside}\n</div>'


def as_page(title: str, sections: Iterable[tuple[str, Iterable[Block]]]) -> str:
    """Returns a whole page.

    Args:
        title: of the page.
        sections: what each is called, and what there is to see.
    """
    parts = [
        f"<h2>{_safe(name)}</h2>\n" + "\n".join(map(_html_of, blocks)) for name, blocks in sections
    ]
    # No script may run and nothing be loaded, whatever a name may hold.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_safe(title)}</title>\n<style>body{{margin:2rem}}{_STYLE}</style>\n</head>\n"
        f'<body class="lazy-orbax">\n<h1>{_safe(title)}</h1>\n' + "\n".join(parts) + "\n</body>\n"
        "</html>\n"
    )


def _safe(text: str) -> str:
    return html.escape(visible(text))


def _html_of(block: Block) -> str:
    if isinstance(block, Lines):
        return "\n".join(f'<div class="{block.kind}">{_safe(line)}</div>' for line in block.lines)
    if isinstance(block, Drawing):
        return "<pre>" + "\n".join(map(_safe, block.lines)) + "</pre>"
    if isinstance(block, Table):
        return _table(block)
    return _spans(block) if isinstance(block, Spans) else _tree(block)


def _table(table: Table) -> str:
    kinds = [' class="n"' if column.is_number else "" for column in table.columns]

    def row(cells: Iterable[str], tag: str) -> str:
        return "".join(f"<{tag}{k}>{_safe(cell)}</{tag}>" for k, cell in zip(kinds, cells))

    head = row((column.name for column in table.columns), "th")
    wrong = dict.fromkeys(table.wrong, ' class="wrong"')
    rows = "\n".join(
        f"<tr{wrong.get(n, '')}>{row(cells, 'td')}</tr>" for n, cells in enumerate(table.rows)
    )
    caption = f"<caption>{_safe(table.title)}</caption>" if table.title else ""
    return f"<table>{caption}\n<tr>{head}</tr>\n{rows}\n</table>"


def _tree(tree: Tree) -> str:
    """Returns a tree that folds. A list and no recursion: the checkpoint says how deep it is."""
    whole, parts = max(tree.root.n_bytes, 1), list[str]()
    is_open = _count(tree.root) <= _MOST_OPEN
    pending: list[Node | str] = [tree.root]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            parts.append(node)
            continue
        share = min(100 * node.n_bytes / whole, 100)
        label = (
            f'<span class="bar"><i style="width:{share:.1f}%"></i></span>{_safe(node.name)}'
            f'<span class="d">{_safe(node.detail)}</span>'
        )
        if not node.inner:
            parts.append(f'<div class="leaf">{label}</div>')
            continue
        shown = " open" if is_open or node is tree.root else ""
        parts.append(f"<details{shown}><summary>{label}</summary>")
        pending += ["</details>", *reversed(node.inner)]
    return "\n".join(parts)


def _count(root: Node) -> int:
    n, pending = 0, [root]
    while pending and n <= _MOST_OPEN:
        n += 1
        pending += pending.pop().inner
    return n


def _spans(spans: Spans) -> str:
    longest = max((row.ends[-1] for row in spans.rows if row.ends), default=0) or 1
    key = "".join(
        f'<i style="background:{_COLORS[n % len(_COLORS)]}"></i>{_safe(part)}'
        for n, part in enumerate(spans.parts)
    )
    rows = []
    for row in spans.rows:
        bars = "".join(
            f'<i style="width:{100 * max(end - begin, 0) / longest:.2f}%;'
            f'background:{_COLORS[n % len(_COLORS)]}"></i>'
            for n, (begin, end) in enumerate(zip((0.0, *row.ends), row.ends))
        )
        rows.append(
            f'<tr><td>{_safe(row.name)}</td><td><span class="spans">{bars}</span></td>'
            f'<td class="d">{_safe(row.detail)}</td></tr>'
        )
    return (
        f'<div>{_safe(spans.title)}</div><div class="key">{key}</div><table>{"".join(rows)}</table>'
    )
