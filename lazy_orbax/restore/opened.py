"""A checkpoint that is opened to be read without a handler: found, looked at, and compared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from lazy_orbax import _paths
from lazy_orbax._orbax.stored_kinds import IN_ZARR
from lazy_orbax.errors import (
    CorruptCheckpointError,
    LazyOrbaxError,
    MalformedCheckpointError,
    OptionError,
    Problem,
)
from lazy_orbax.integrity.array_format import formats_of
from lazy_orbax.integrity.digest_file import DIRECTORY
from lazy_orbax.integrity.step_place import is_item, is_run
from lazy_orbax.integrity.stored_item import Piece, StoredItem
from lazy_orbax.integrity.verify import raise_corrupt
from lazy_orbax.restore.compare_arrays import explain
from lazy_orbax.restore.planned import MissingChunkError
from lazy_orbax.restore.transformed import Checkpoint
from lazy_orbax.timeline import RestoreRecorder
from lazy_orbax.trust.malformed import refuse_malformed

_MOST_NAMED = 10


def item_at(path: Any) -> str:
    """Returns the directory of the item that a path means.

    Raises:
        OptionError: there is none, or there are several.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"Give the path of a checkpoint: found {path!r}.")
    place = epath.Path(_paths.without_dots(os.fspath(path)))
    children = sorted(child.name for child in place.iterdir()) if place.is_dir() else []
    if is_item(children):
        return str(place)
    inside = [name for name in children if not name.startswith((".", "_"))]
    items = [
        name
        for name in inside
        if (place / name).is_dir() and is_item([part.name for part in (place / name).iterdir()])
    ]
    if len(items) == 1:
        return str(place / items[0])
    if not items and is_run(place, children):
        steps = [name for name in inside if _paths.TEMPORARY not in name]
        newest = max(steps, key=lambda name: _paths.step_of(name) or 0, default="STEP")
        raise OptionError(f"{place} is a run. Give one of its steps, such as {place / newest}.")
    found = f"the items {', '.join(items)}" if items else "no checkpoint"
    raise OptionError(f"{place} holds {found}. Give the directory of one item.")


def opened(directory: str, verify: bool) -> Checkpoint:
    """Looks at a checkpoint, and at its digests.

    Args:
        directory: of an item, or its address.
        verify: whether digests are to be compared, where there are any.

    Raises:
        OptionError: it is too old.
        CorruptCheckpointError: what describes it is not what was saved.
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
    """
    try:
        contents = refuse_malformed(directory, None, DIRECTORY if verify else "")
    except MalformedCheckpointError as error:
        if verify:
            found = StoredItem(directory)
            problems = [*found.problems, *found.check_files()]
            raise_corrupt(directory, problems, error, look=True)
        raise
    if contents is None or contents.tree is None:
        raise OptionError(f"{directory} holds no {_paths.TREE}: it is too old for this.")
    stored = StoredItem(directory, contents.files) if verify else None
    if stored is not None and stored.is_covered:
        raise_corrupt(directory, [*stored.problems, *stored.check_files()], look=True)
    else:
        stored = None
    try:
        return Checkpoint(contents, formats_of(contents), stored)
    except ValueError as error:
        if stored is not None:
            raise_corrupt(directory, stored.check_arrays(), error, look=True)
        wanted = "a Zarr array as Orbax writes it"
        raise MalformedCheckpointError(directory, str(error), wanted) from error


def refuse_unstored(source: Checkpoint) -> None:
    """Checks that each array of the tree is stored.

    Raises:
        CorruptCheckpointError: one is not there as it was saved.
        MalformedCheckpointError: one is not there, and there is no digest of it.
    """
    assert source.contents.tree is not None
    leaves, directory = source.contents.tree.leaves, source.contents.directory
    missing = [
        name for name, kind in leaves.items() if kind in IN_ZARR and name not in source.formats
    ]
    if source.stored is not None:
        known = [name for name in missing if name in source.stored.leaves]
        raise_corrupt(directory, source.stored.check_arrays(known), look=True)
    if missing:
        what = f"no array for the leaves {', '.join(missing[:_MOST_NAMED])}"
        raise MalformedCheckpointError(directory, what, "one for each leaf of the tree")


@contextlib.contextmanager
def missing_is_corrupt(recorder: RestoreRecorder, *sources: Checkpoint) -> Iterator[None]:
    """Says of a checkpoint that cannot be read what is wrong with it.

    Raises:
        CorruptCheckpointError: a chunk is missing, or is not what its metadata says.
    """
    try:
        yield
    except (MissingChunkError, ValueError, KeyError, OSError) as error:
        if isinstance(error, LazyOrbaxError) or error is recorder.ended_by:
            raise
        for source in sources:
            if source.stored is not None:
                problems = source.stored.check_arrays()
                problems = problems or list(source.stored.check_pieces(source.stored.pieces))
                raise_corrupt(source.contents.directory, problems, error, look=True)
        places = ", ".join(source.contents.directory for source in sources)
        raise CorruptCheckpointError(places, [Problem(f"cannot be read: {error}")]) from error


def raise_wrong(source: Checkpoint, wrong: list[Piece], unchecked: frozenset[str]) -> None:
    """Raises what the digests say of what was read.

    Args:
        source: what was read.
        wrong: its pieces that are not what was saved.
        unchecked: its leaves whose digests were not compared in passing. They are read again.

    Raises:
        CorruptCheckpointError: something is not what was saved.
    """
    if source.stored is None:
        return
    problems = [explain(source.stored, piece) for piece in wrong]
    left = (piece for piece in source.stored.pieces if piece.leaf in unchecked)
    problems = problems or list(source.stored.check_pieces(left))
    raise_corrupt(source.contents.directory, problems, look=True)
