"""What is in a checkpoint: its leaves with their types, shapes, shardings and sizes."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError, OptionError, Problem
from lazy_orbax.inspection.leaves import ItemLeaves, LeafEntry, drawing_of
from lazy_orbax.inspection.looking import ITEM, RUN, STEP, items_of, look, newest_step, sizes_in
from lazy_orbax.integrity.step_place import is_item
from lazy_orbax.storage.places import place_of
from lazy_orbax.view.blocks import Block, Column, Drawing, Lines, Node, Table, Tree
from lazy_orbax.view.text import counted, size_of
from lazy_orbax.view.viewed import Viewed

FILES = "files"
"""How an item is stored that is no tree, such as JSON."""
SORTS = ("tree", "name", "size")
_COLUMNS = (
    Column("name"),
    Column("dtype"),
    Column("shape"),
    Column("chunk"),
    Column("size", is_number=True),
    Column("sharding"),
)


@dataclasses.dataclass(frozen=True)
class ItemEntry(Viewed):
    """What is in an item.

    Attributes:
        path: the item's directory.
        name: of the item.
        storage: how arrays are stored, such as `zarr in ocdbt`; `files` if it is no tree.
        n_leaves: how many leaves it has in all.
        n_bytes: of all its arrays, decoded; of its files where it is no tree.
        leaves: those that were asked for.
        has_digests: whether lazy_orbax can compare it with digests.
        shardings: those of its leaves, each once: JSON, as Orbax writes it.
        drawing: which devices had which part, if one leaf was asked for.
        problems: what is wrong with it.
    """

    path: str
    name: str
    storage: str
    n_leaves: int
    n_bytes: int
    leaves: tuple[LeafEntry, ...] = ()
    has_digests: bool = False
    shardings: tuple[str, ...] = ()
    drawing: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        digests = "with digests" if self.has_digests else "no digests"
        what = f"{self.n_leaves} leaves, {size_of(self.n_bytes)}, {self.storage}, {digests}"
        if self.storage == FILES:
            what = f"{counted(self.n_leaves, 'file')}, {size_of(self.n_bytes)}"
        title = f"{self.path}: {what}"
        rows = tuple(map(_row, self.leaves))
        parts: list[Block] = (
            [Table(_COLUMNS, rows, title).without_empty_columns()] if rows else [Lines((title,))]
        )
        if self.drawing:
            parts.append(Drawing(self.drawing))
        if self.problems:
            parts.append(Lines(tuple(map(str, self.problems)), "problem"))
        return tuple(parts)

    def tree(self) -> Tree:
        """Returns the leaves as a tree of sizes."""
        return tree_of(self.leaves, self.name)


@dataclasses.dataclass(frozen=True)
class CheckpointListing(Viewed):
    """What `show` found.

    Attributes:
        path: what was shown: of a run its newest committed step.
        items: the items, one after the other.
    """

    path: str
    items: tuple[ItemEntry, ...]

    @property
    def ok(self) -> bool:
        """Whether each item is what Orbax writes."""
        return not any(item.problems for item in self.items)

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        return tuple(block for item in self.items for block in item.blocks())

    def _repr_html_(self) -> str:
        from lazy_orbax.view.html import as_html

        parts: list[Block] = []
        for item in self.items:
            notes = [block for block in item.blocks() if not isinstance(block, Table)]
            parts += [*([Lines((item.path,)), item.tree()] if item.leaves else []), *notes]
        return as_html(parts)


def show(
    path: Any, pattern: str | None = None, *, sort: str = "tree", depth: int | None = None
) -> CheckpointListing:
    """Shows what is in a checkpoint, from its metadata alone.

    Args:
        path: the directory or `gs://` address of an item, of a step, or of a run, of which the
            newest committed step is shown.
        pattern: which leaves, such as `params/*kernel` or `*.bias`; `None` is all of them.
        sort: `tree` is the order of the tree; `name`; or `size`, the largest first.
        depth: leaves that share so many keys are put together, with their bytes; `None` shows each.

    Returns:
        The items and their leaves. One that Orbax did not write is told of in its `problems`.

    Raises:
        OptionError: there is no checkpoint, or `sort` or `depth` is none of these.
        OSError: the storage refused.
    """
    if sort not in SORTS or (depth is not None and depth < 1):
        raise OptionError(f"Found sort={sort!r}, depth={depth}: wanted {SORTS}, at least 1.")
    seen = look(path, (ITEM, STEP, RUN))
    seen = newest_step(seen) if seen.kind == RUN else seen
    found = [item_entry(name, at, pattern) for name, at in items_of(seen).items()]
    if sort != "tree" or depth:
        found = [dataclasses.replace(i, leaves=_arranged(i.leaves, sort, depth)) for i in found]
    return CheckpointListing(str(seen.path), tuple(found))


def item_entry(name: str, directory: str, pattern: str | None = None) -> ItemEntry:
    """Returns what is in an item.

    Args:
        name: of the item.
        directory: where it is.
        pattern: which leaves.
    """
    try:
        if not is_item([child.name for child in place_of(directory).as_path().iterdir()]):
            sizes = sizes_in(directory)
            return ItemEntry(directory, name, FILES, len(sizes), sum(sizes.values()))
        item = ItemLeaves(directory)
        leaves, problems = item.entries, tuple(item.problems)
    except MalformedCheckpointError as error:
        return ItemEntry(directory, name, "malformed", 0, 0, problems=(error.problem,))
    n_bytes = sum(leaf.n_bytes for leaf in leaves)
    wanted = tuple(leaf for leaf in leaves if pattern is None or _fits(leaf, pattern))
    drawing = ()
    if len(wanted) == 1:
        drawing = drawing_of(item.shardings.get(wanted[0].name, "{}"))
    has_digests = bool(item.digests or item.strings)
    return ItemEntry(
        *(directory, name, item.storage, len(leaves), n_bytes, wanted),
        *(has_digests, tuple(dict.fromkeys(item.shardings.values())), drawing, problems),
    )


def _fits(leaf: LeafEntry, pattern: str) -> bool:
    path = "/".join(leaf.keys)
    return fnmatch.fnmatchcase(leaf.name, pattern) or fnmatch.fnmatchcase(path, pattern)


def _arranged(leaves: tuple[LeafEntry, ...], sort: str, depth: int | None) -> tuple[LeafEntry, ...]:
    if depth is not None:
        leaves = _together(leaves, depth)
    if sort == "name":
        return tuple(sorted(leaves, key=lambda leaf: leaf.name))
    return tuple(sorted(leaves, key=lambda leaf: -leaf.n_bytes)) if sort == "size" else leaves


def _together(leaves: Iterable[LeafEntry], depth: int) -> tuple[LeafEntry, ...]:
    """Puts leaves together that share their first keys."""
    groups: dict[tuple[str, ...], list[LeafEntry]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.keys[:depth], []).append(leaf)
    return tuple(
        group[0] if len(group) == 1 and len(group[0].keys) <= depth else _group(keys, group)
        for keys, group in groups.items()
    )


def _group(keys: tuple[str, ...], group: list[LeafEntry]) -> LeafEntry:
    dtypes = sorted({leaf.dtype for leaf in group} - {""})
    held = [leaf.stored_bytes for leaf in group]
    return LeafEntry(
        name=".".join(keys),
        keys=keys,
        kind=f"{len(group)} leaves",
        dtype=", ".join(dtypes),
        shape=(),
        chunk=(),
        sharding="",
        n_bytes=sum(leaf.n_bytes for leaf in group),
        stored_bytes=sum(n or 0 for n in held) if any(n is not None for n in held) else None,
        is_covered=all(leaf.is_covered for leaf in group),
    )


def _row(leaf: LeafEntry) -> tuple[str, ...]:
    is_array = bool(leaf.dtype) and not leaf.kind.endswith(" leaves")
    shape = str(list(leaf.shape)) if is_array else leaf.kind
    chunk = str(list(leaf.chunk)) if is_array and leaf.chunk != leaf.shape else ""
    return (leaf.name, leaf.dtype or "-", shape, chunk, size_of(leaf.n_bytes), leaf.sharding)


def tree_of(leaves: Iterable[LeafEntry], name: str) -> Tree:
    """Returns leaves as a tree of sizes.

    Args:
        leaves: in the order of the tree.
        name: of its root.
    """
    root: dict[str, Any] = {}
    for leaf in leaves:
        node = root
        for key in leaf.keys[:-1]:
            inner = node.get(key)
            if not isinstance(inner, dict):  # A leaf has this name, too: names are data.
                inner = node[key] = {}
            node = inner
        node[leaf.keys[-1] if leaf.keys else name] = leaf
    return Tree(_folded(root, name))


def _folded(root: dict[str, Any], name: str) -> Node:
    """Makes nodes of nested dictionaries, those within first. No recursion: see `view/html.py`."""
    order: list[tuple[dict[str, Any], str]] = []
    pending = [(root, name)]
    while pending:
        node, key = pending.pop()
        order.append((node, key))
        pending += [(inner, key) for key, inner in node.items() if isinstance(inner, dict)]
    made: dict[int, Node] = {}
    for node, key in reversed(order):
        inner = tuple(
            made[id(value)] if isinstance(value, dict) else _leaf_node(key, value)
            for key, value in node.items()
        )
        n_bytes = sum(each.n_bytes for each in inner)
        made[id(node)] = Node(key, size_of(n_bytes), n_bytes, inner)
    return made[id(root)]


def _leaf_node(key: str, leaf: LeafEntry) -> Node:
    _, dtype, shape, chunk, size, sharding = _row(leaf)
    chunk = f"chunk {chunk}" if chunk else ""
    digest = "" if leaf.is_covered or not leaf.dtype else "no digest"
    detail = "  ".join(filter(None, (dtype, shape, size, sharding, chunk, digest)))
    return Node(key, detail, leaf.n_bytes)
