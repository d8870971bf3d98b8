"""Chunks that are what they are in the step before: linked, and not written again.

A hard link is a second name of a file. A step that has one is whole without the other step, for
stock Orbax as for us. Nobody changes such a file in place: TensorStore writes another, and renames.
A file that was changed since its digest was noted is not linked: it is no longer what was saved.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.chunk_location import MOST_KEYS, keys_of
from lazy_orbax.integrity.digest_file import DigestError, LeafDigests
from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.slabs import Piece, Plan
from lazy_orbax.save.disk_format import Format
from lazy_orbax.storage.places import place_of


def refuse_unlinkable(format_: Format, directory: str) -> None:
    """Checks that chunks can be linked where an item goes.

    Raises:
        OptionError: they cannot.
    """
    remedy = "Set LazyOptions(skip_unchanged=False)"
    if not place_of(directory).has_special_files:
        raise OptionError(
            f"skip_unchanged: {directory} is in an object store, which has no hard links. {remedy}."
        )
    if format_.digests.use_ocdbt:
        raise OptionError(
            "skip_unchanged: OCDBT has many arrays in one file, and a link to it would keep those "
            f"that changed as well. {remedy}, or save with use_ocdbt=False."
        )


_log = logging.getLogger("lazy_orbax")


class _Stored(NamedTuple):
    """How an array is stored, in this step and in the one before."""

    metadata: dict[str, Any]
    shape: Shape
    chunk: Shape


class Links:
    """Links the chunks of a save to those of a committed step. Used by one thread at a time.

    Attributes:
        n_bytes: bytes of the pieces that were linked.
    """

    def __init__(
        self,
        earlier: str,
        known: Mapping[str, LeafDigests],
        directory: str,
        plan: Plan,
        format_: Format,
    ):
        """Links nothing yet.

        Args:
            earlier: the item in the step before.
            known: its digests, by name of the leaf.
            directory: the item's directory, which exists.
            plan: what is saved.
            format_: how it is stored.

        Raises:
            OSError: the file of these digests was deleted meanwhile.
        """
        self._earlier, self._known, self._directory = earlier, known, directory
        self._plan, self._format = plan, format_
        self._stored_of = functools.lru_cache(None)(self._read_stored)
        self._noted_ns = os.stat(f"{earlier}/{_file_of(format_)}").st_mtime_ns
        self.n_bytes = 0

    def digest_of(self, piece: Piece) -> int | None:
        """Returns the digest of a piece in the step before; `None` where it was no such piece."""
        leaf = self._plan.leaves[piece.leaf]
        known, dtype = self._known.get(leaf.name), self._format.digests.dtypes[piece.leaf]
        if known is None or (known.dtype, known.shape) != (dtype, leaf.shape):
            return None
        box = Box(piece.start, piece.shape)
        found = known.touching(box)
        return found[0][1] if len(found) == 1 and found[0][0] == box else None

    def link(self, piece: Piece, n_bytes: int) -> bool:
        """Links the chunks of a piece. Returns whether they are all there.

        Args:
            piece: a piece that is the same in the step before.
            n_bytes: its size.
        """
        stored = self._stored_of(piece.leaf)
        keys = _keys(stored, Box(piece.start, piece.shape)) if stored is not None else None
        if keys is None:
            return False
        prefix = self._format.leaves[piece.leaf].prefix
        try:
            for key in keys:
                source, name = (f"{at}/{prefix}{key}" for at in (self._earlier, self._directory))
                found = os.lstat(source)
                if not stat.S_ISREG(found.st_mode):
                    return False
                if found.st_mtime_ns > self._noted_ns:
                    _log.warning("%s was changed after it was saved. It is not linked.", source)
                    return False
                os.makedirs(os.path.dirname(name), exist_ok=True)
                os.link(source, name, follow_symlinks=False)
        except OSError:  # Deleted meanwhile, not stored, on another disk, too many links: written.
            return False
        self.n_bytes += n_bytes
        return True

    def _read_stored(self, leaf: int) -> _Stored | None:
        """Returns how a leaf is stored, if that is so in both steps."""
        mine = self._format.leaves[leaf]
        name = f"{self._earlier}/{mine.prefix}{mine.metadata_key}"
        try:
            with open(name, "rb") as file:
                if file.read(len(mine.metadata) + 1) != mine.metadata:
                    return None
        except OSError:
            return None
        metadata = json.loads(mine.metadata)
        grid = metadata.get("chunk_grid")
        chunk = grid["configuration"]["chunk_shape"] if grid else metadata["chunks"]
        return _Stored(metadata, tuple(metadata["shape"]), tuple(chunk))


def _file_of(format_: Format) -> str:
    return f"{digest_file.DIRECTORY}/process_{format_.digests.process}"


def _keys(stored: _Stored, box: Box) -> list[str] | None:
    """Returns the keys of the chunks of a box; `None` where one has something of another box."""
    sides = list(zip(box.start, box.shape, stored.chunk, stored.shape, strict=True))
    is_whole = all(a % c == 0 and ((a + n) % c == 0 or a + n == m) for a, n, c, m in sides)
    n_chunks = math.prod(-(-n // c) for _, n, c, _ in sides)
    return (
        keys_of(stored.metadata, stored.chunk, box) if is_whole and n_chunks < MOST_KEYS else None
    )


def links_to_earlier(directory: str, plan: Plan, format_: Format) -> Links | None:
    """Returns what links to the newest committed step before an item's own; `None`: there is none.

    Args:
        directory: the item's directory, not published yet.
        plan: what is saved.
        format_: how it is stored.
    """
    mine = _paths.step_directory(directory)
    number = _paths.step_of(mine.rpartition("/")[2])
    if number is None:
        return None
    inside = _paths.final(directory).removeprefix(_paths.final(mine))
    steps = _paths.steps_in(place_of(mine.rpartition("/")[0]).as_path())
    earlier = [s for s in steps if not s.is_temporary and s.step is not None and s.step < number]
    if not earlier:
        return None
    item = f"{earlier[-1].path}{inside}"
    content = place_of(item).read_if_there(_file_of(format_))
    try:
        saved = digest_file.parse(content) if content is not None else None
    except DigestError:
        return None
    is_alike = saved is not None and not saved.use_ocdbt and saved.step == earlier[-1].step
    if saved is None or not is_alike or saved.driver != format_.digests.driver:
        return None
    known = {leaf.name: leaf for leaf in saved.leaves}
    try:
        return Links(item, known, directory, plan, format_)
    except OSError:
        return None
