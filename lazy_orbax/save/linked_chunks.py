"""Chunks that are what they are in the step before: linked, and not written again.

`linked_files.py` links those that are files, `linked_values.py` those in a database.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError, OptionError
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.chunk_location import MOST_KEYS, keys_of
from lazy_orbax.integrity.digest_file import DigestError, LeafDigests
from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.slabs import Piece, Plan
from lazy_orbax.save.disk_format import Format
from lazy_orbax.save.linked_files import LinkedFiles, OpenEarlier
from lazy_orbax.save.linked_values import LinkedValues
from lazy_orbax.storage.places import place_of

_LOG = logging.getLogger("lazy_orbax")


def refuse_unlinkable(directory: str) -> None:
    """Checks that chunks can be linked where an item goes.

    Raises:
        OptionError: they cannot.
    """
    if not place_of(directory).has_special_files:
        raise OptionError(
            f"skip_unchanged: {directory} is in an object store, which has no hard links. "
            "Set LazyOptions(skip_unchanged=False)."
        )


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
        stored: LinkedFiles | LinkedValues,
        known: Mapping[str, LeafDigests],
        plan: Plan,
        format_: Format,
    ):
        """Links nothing yet.

        Args:
            stored: what is stored in the step before.
            known: its digests, by name of the leaf.
            plan: what is saved.
            format_: how it is stored.
        """
        self._stored, self._known, self._plan, self._format = stored, known, plan, format_
        self._stored_of = functools.lru_cache(None)(self._read_stored)
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
            is_linked = all(self._stored.link(f"{prefix}{key}") for key in keys)
        except OSError:  # Then it is written.
            return False
        self.n_bytes += n_bytes if is_linked else 0
        return is_linked

    def finish(self, open_earlier: OpenEarlier) -> None:
        """Lets readers find what was linked, once all else was written.

        Args:
            open_earlier: is `ItemStores.open_earlier`.

        Raises:
            ValueError: the storage refused.
            OSError: the storage refused.
        """
        self._stored.finish(open_earlier)

    def _read_stored(self, leaf: int) -> _Stored | None:
        """Returns how a leaf is stored, if that is so in both steps."""
        mine = self._format.leaves[leaf]
        if self._stored.metadata(f"{mine.prefix}{mine.metadata_key}") != mine.metadata:
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

    Nor is there one that cannot be read, whatever is wrong with it: then all is written.

    Args:
        directory: the item's directory, not published yet.
        plan: what is saved.
        format_: how it is stored.
    """
    try:
        return _links_to_earlier(directory, plan, format_)
    except (OSError, DigestError, MalformedCheckpointError) as error:
        _LOG.info("%s: nothing of the step before can be linked: %s", directory, error)
        return None


def _links_to_earlier(directory: str, plan: Plan, format_: Format) -> Links | None:
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
    saved = digest_file.parse(content) if content is not None else None
    in_database = format_.digests.use_ocdbt
    if saved is None or (saved.use_ocdbt, saved.step) != (in_database, earlier[-1].step):
        return None
    # A process that writes no arrays has no database, and one that mixes formats several.
    if saved.driver != format_.digests.driver or (in_database and len(format_.kvstores) != 1):
        return None
    known = {leaf.name: leaf for leaf in saved.leaves}
    files = LinkedFiles(item, directory, _file_of(format_))
    stored = LinkedValues(files, format_.own_directories[0]) if in_database else files
    return Links(stored, known, plan, format_)
