"""One page about a run or a checkpoint, which needs no network."""

from __future__ import annotations

import os
from typing import Any

from lazy_orbax.inspection.du import du
from lazy_orbax.inspection.leaves import drawing_of, sharding_in_words
from lazy_orbax.inspection.looking import ITEM, RUN, STEP, look
from lazy_orbax.inspection.ls import ls
from lazy_orbax.inspection.show import CheckpointListing, ItemEntry, show
from lazy_orbax.inspection.timeline import files_of, timeline
from lazy_orbax.view.blocks import Block, Drawing, Lines, Table
from lazy_orbax.view.html import as_page

_MOST_DRAWN = 4


def html(path: Any, *, verify: bool = False) -> str:
    """Returns a page: steps and what they cost, a tree to fold, shardings, digests, timelines.

    It is one HTML document without scripts, and loads nothing.

    Args:
        path: the directory or `gs://` address of a run, of a step, or of an item.
        verify: whether to read all of it, and compare it with its digests.

    Raises:
        OptionError: there is no checkpoint.
        OSError: the storage refused.
    """
    seen = look(path, (RUN, STEP, ITEM))
    sections, has_tree = list[tuple[str, tuple[Block, ...]]](), True
    if seen.kind == RUN:
        steps, use = ls(seen.path), du(seen.path)
        sections += [("Steps", steps.blocks()), ("Cost", (use.tree(), *use.blocks()[1:]))]
        has_tree = any(entry.state == "committed" for entry in steps.steps)
    if has_tree:
        listing = show(seen.path)
        newest = "Newest step: " if seen.kind == RUN else ""
        sections.append((f"{newest}{listing.path}", _tree_blocks(listing)))
    if verify:
        from lazy_orbax.integrity.verify import verify as compare

        sections.append(("Compared with digests", compare(str(seen.path)).blocks()))
    if seen.kind == RUN and files_of(os.fspath(path)):
        sections.append(("Time", timeline(path).blocks()))
    return as_page(str(seen.path), sections)


def _tree_blocks(listing: CheckpointListing) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for item in listing.items:
        notes = [block for block in item.blocks() if not isinstance(block, Table)]
        covered = sum(leaf.is_covered for leaf in item.leaves)
        arrays = sum(bool(leaf.dtype) for leaf in item.leaves)
        digests = f"digests of {covered} leaves" if item.has_digests else "no digests"
        what = f"{item.n_leaves} leaves, {arrays} of them arrays, {item.storage}, {digests}"
        if item.leaves:
            blocks += [Lines((f"{item.path}: {what}",)), item.tree()]
        blocks += [*notes, *_drawings(item)]
    return tuple(blocks)


def _drawings(item: ItemEntry) -> list[Block]:
    """Draws the shardings of an item, of which there are few: leaves share them."""
    drawn: list[Block] = []
    for said in item.shardings:
        if (lines := drawing_of(said)) and len(drawn) < _MOST_DRAWN:
            drawn.append(Drawing((sharding_in_words(said), *lines)))
    return drawn
