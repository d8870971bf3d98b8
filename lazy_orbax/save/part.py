"""A part of an item: what one program writes of it, of several that share a file system alone.

Each writes a database and a file of digests of its own, under names that no other attempt has:
what comes late is in nobody's way. One of them joins the parts.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax._orbax.records import Destination, Settings
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.plan.shards import Layout, Leaf
from lazy_orbax.plan.slabs import Piece, Plan, Slab
from lazy_orbax.recovery import leftovers
from lazy_orbax.save.disk_format import Format
from lazy_orbax.save.item_stores import CONTEXT
from lazy_orbax.save.merge import merge_databases
from lazy_orbax.save.plan_cache import Prepared, make_prepared
from lazy_orbax.save.writer import Writer
from lazy_orbax.storage.deadline import Deadline
from lazy_orbax.storage.place import Place
from lazy_orbax.storage.places import STORAGE_TIMEOUT_S, place_of
from lazy_orbax.storage.save_error import save_error

# Of what is written and not acknowledged yet.
_MOST_BYTES = 2**26


class Attempt(NamedTuple):
    """One attempt to write an item in parts.

    Attributes:
        token: no other attempt has it.
        parts: the numbers of the parts. The first one is 0, and has what is written once.
    """

    token: str
    parts: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Where the files of digests are until the parts are joined."""
        return f"{_paths.DIGESTS}-{self.token}"

    def database(self, part: int) -> str:
        """Returns the directory of the database of a part."""
        return f"{_paths.PROCESS_DIRECTORY}{part}-{self.token}"


def prepare_part(
    settings: Settings,
    item: Any,
    chunks: Mapping[str, Shape],
    boxes: Mapping[str, Iterable[Box]],
    directory: str,
) -> Prepared:
    """Returns how a part is written, as if it were all of the item.

    Args:
        settings: how a handler saves.
        item: a tree like the item, whose values are not read.
        chunks: the chunk shape of each leaf, by name.
        boxes: what of each leaf is in the part: whole chunks.
        directory: the item's directory.

    Raises:
        TreeError: such a tree cannot be saved.
    """

    def divide(leaves: Sequence[Leaf], _: Any) -> Plan:
        layouts = tuple(
            Layout(tuple(chunks[leaf.name]), None, (), False, True, (), frozenset())
            for leaf in leaves
        )
        pieces = tuple(
            Piece(i, 0, 0, box.start, box.shape, box.start)
            for i, leaf in enumerate(leaves)
            for box in boxes.get(leaf.name, ())
        )
        slab = Slab("host", tuple(range(len(leaves))), (), pieces, 0, 0)
        return Plan(tuple(leaves), layouts, (slab,))

    destination = Destination(place_of(directory).stand_in(), None)
    return make_prepared(settings, item, None, destination, divide)


def _format_of(whole: Format, attempt: Attempt, part: int) -> Format:
    own = attempt.database(part)
    digests = dataclasses.replace(
        whole.digests, process=part, processes=attempt.parts, folder=attempt.folder
    )
    kvstores = tuple(text.replace(f"{_paths.PROCESS_DIRECTORY}0", own) for text in whole.kvstores)
    changed = dataclasses.replace(whole, kvstores=kvstores, digests=digests)
    if part == 0:
        return changed
    return dataclasses.replace(changed, is_primary=False, tree_metadata=None, files={})


def write_part(
    prepared: Prepared,
    pieces: Mapping[str, Mapping[Box, np.ndarray]],
    directory: str,
    attempt: Attempt,
    part: int,
    texts: Mapping[str, str],
) -> int:
    """Writes a part, and makes it durable.

    Args:
        prepared: how.
        pieces: the data, by leaf and box. It must stay as it is meanwhile.
        directory: the item's directory, which is there.
        attempt: at what.
        part: which one.
        texts: the leaves that are strings, by name.

    Returns:
        The digest of its file of digests.

    Raises:
        SaveError: the storage refused it, or did nothing for too long.
    """
    plan, format_ = prepared.plan, _format_of(prepared.format, attempt, part)
    writer = Writer(plan, format_, directory, timeout_s=STORAGE_TIMEOUT_S)
    try:
        batch, n_bytes = list[tuple[Piece, np.ndarray]](), 0
        for piece in (piece for slab in plan.slabs for piece in slab.pieces):
            data = pieces[plan.leaves[piece.leaf].name][Box(piece.start, piece.shape)]
            batch.append((piece, data))
            n_bytes += math.prod(piece.shape) * data.dtype.itemsize
            if n_bytes >= _MOST_BYTES:
                writer.wait(writer.write(batch))
                batch, n_bytes = [], 0
        writer.wait(writer.write(batch))
        writer.finish(None, texts)
    finally:
        writer.close()
    return digest_of_bytes(place_of(directory).read(f"{attempt.folder}/process_{part}"))


def join_parts(
    directory: str, attempt: Attempt, told: Mapping[int, int], shapes: Mapping[str, Shape]
) -> None:
    """Makes an ordinary item of its parts, of which all are there.

    Args:
        directory: the item's directory.
        attempt: at what.
        told: what `write_part` returned to each of those who wrote a part.
        shapes: of the leaves that the item has, by name.

    Raises:
        SaveError: a part is not what was written, something is in no part, or the storage refused.
    """
    place, deadline = place_of(directory), Deadline(directory, STORAGE_TIMEOUT_S)
    contents = {}
    for part in attempt.parts:
        content = place.peek(f"{attempt.folder}/process_{part}")
        if content is None or digest_of_bytes(content) != told[part]:
            what = f"part {part} is not what was written there; do all see one file system?"
            raise SaveError(what, directory=directory)
        contents[part] = content
    _refuse_gaps(directory, contents.values(), shapes)

    def wait(futures: Iterable[Any]) -> None:
        for future in futures:
            deadline.result_of(future)

    context = ts.Context({**CONTEXT, **place.context_spec()})
    deadline.begin()
    try:
        base = ts.KvStore.open(place.kvstore_spec(), context=context).result()
        parts = [_database(base / f"{attempt.database(part)}/", context) for part in attempt.parts]
        merge_databases(base, parts, context, wait)
        names = {part: f"{_paths.DIGESTS}/process_{part}" for part in attempt.parts}
        wait([base.write(names[part], content) for part, content in contents.items()])
        remove_folder(place, attempt.folder)
    except (ValueError, OSError) as error:
        raise save_error(directory, error) from error
    finally:
        deadline.end([])


def _refuse_gaps(directory: str, digests: Iterable[bytes], shapes: Mapping[str, Shape]) -> None:
    """Refuses parts that do not make up all of their leaves: whose trees differ, perhaps.

    Raises:
        SaveError: something of a leaf is in no part.
    """
    written: dict[str, set[Box]] = {name: set() for name in shapes}
    for leaf in (leaf for content in digests for leaf in digest_file.parse(content).leaves):
        written.setdefault(leaf.name, set()).update(leaf.boxes)
    for name, shape in shapes.items():
        found, wanted = sum(math.prod(box.shape) for box in written[name]), math.prod(shape)
        if found != wanted:
            what = f"leaf {name}: found {found} of its {wanted} elements in the parts; is the tree "
            raise SaveError(f"{what}the same on all machines?", directory=directory)


def remove_folder(place: Place, name: str) -> None:
    """Removes a folder, wherever it is, if it is there. What cannot be removed locally stays.

    Args:
        place: a directory.
        name: of the folder in it.

    Raises:
        ValueError: an object store refused.
    """
    if not place.needs_sync:
        keys = ts.KvStore.KeyRange(f"{name}/", f"{name}0")  # Nothing else comes after a slash.
        place.kvstore.delete_range(keys).result()
    elif place.has(name):
        leftovers.remove([os.path.join(place.directory, name)])


def _database(base: ts.KvStore, context: ts.Context) -> ts.KvStore:
    """Returns a database that is there, whatever its settings."""
    return ts.KvStore.open(
        {"driver": "ocdbt", "base": base.spec().to_json()}, context=context
    ).result()
