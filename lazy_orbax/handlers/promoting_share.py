"""What one machine writes of an item of a step that several bring to a tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lazy_orbax import _paths
from lazy_orbax._orbax import handed_in
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers.stock_shaped import lazy_part_of, pytree_handler
from lazy_orbax.recovery import leftovers
from lazy_orbax.save.part import Attempt, prepare_part, remove_folder, write_part
from lazy_orbax.storage.places import place_of
from lazy_orbax.tiers.kept_tree import KeptTree
from lazy_orbax.tiers.snapshot_file import Snapshot


class Share:
    """What this machine writes of an item, in memory of its own.

    Attributes:
        shapes: of all leaves of the item, by name.
    """

    def __init__(self, snapshots: Sequence[Snapshot]):
        """Copies it, and compares each piece with its digest.

        Args:
            snapshots: of the processes of this machine.

        Raises:
            SnapshotError: they make no sense.
            RestoreError: a part of it is not here, or not what was put there.
        """
        tree, lazy = KeptTree(snapshots), lazy_part_of(pytree_handler())
        if lazy is None:
            raise KeeperError("this version of Orbax is not known; nothing is brought to a tier")
        self._settings, self._like = lazy.settings, tree.stand_in()
        self.shapes = {name: form.shape for name, form in tree.formats.items()}
        self._chunks, self._copies = tree.shard_shapes(), tree.own_copies()

    def _prepared(self, directory: str) -> tuple[Any, list[Any]]:
        prepared = prepare_part(self._settings, self._like, self._chunks, self._copies, directory)
        return prepared, jax.tree.leaves(self._like)

    def write(self, directory: str, attempt: Attempt, part: int) -> int:
        """Writes it. Returns the digest of its file of digests.

        Args:
            directory: the item's, which is there.
            attempt: at what.
            part: the number of this machine.

        Raises:
            SaveError: the storage refused it, or did nothing for too long.
        """
        prepared, leaves = self._prepared(directory)
        texts = prepared.texts(leaves)
        return write_part(prepared, self._copies, directory, attempt, part, texts)

    async def write_strings(self, directory: Any) -> None:
        """Lets Orbax write what is not in arrays. One machine does.

        Args:
            directory: the item's.
        """
        prepared, leaves = self._prepared(str(directory))
        for other in await handed_in.serialize_others(
            self._settings, prepared.others, leaves, directory
        ):
            other.result()


def remove_late(directory: str, attempt: Attempt, part: int) -> None:
    """Removes what was written of a part, perhaps after everything else was removed there.

    Args:
        directory: the item's.
        attempt: that was given up.
        part: of this machine.
    """
    place = place_of(directory)
    remove_folder(place, attempt.database(part))
    remove_folder(place, attempt.folder)
    # The directories that TensorStore makes again, and no others: there may be a newer attempt.
    for path in (directory, _paths.temporary_root(directory)) if place.needs_sync else ():
        if path and not leftovers.remove_if_empty(path):
            return
