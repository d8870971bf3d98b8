"""Writes the arrays of a merged item, and takes the digests of what it writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.combine.merge_plan import chunks_in
from lazy_orbax.combine.merge_sources import MergedLeaf
from lazy_orbax.integrity.digest import digest_of
from lazy_orbax.integrity.digest_file import DigestTemplate
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.shards import Leaf
from lazy_orbax.plan.slabs import Piece, Plan, Slab
from lazy_orbax.save.item_stores import CONTEXT
from lazy_orbax.save.merge import INLINE_BYTES, database_in, merge_databases
from lazy_orbax.storage.deadline import Deadline
from lazy_orbax.storage.place import Place
from lazy_orbax.storage.save_error import save_error

# As saves have it: small nodes while much is written, and one node for the readers in the end.
_NODE_BYTES = 2**20


class LeafWriter:
    """Writes boxes of leaves. Several threads may at once.

    Invariant, under the lock: `_stores` has an open array for each leaf of which something was
    written, `_digests` the digest of each chunk, and `n_bytes` the sum of their bytes.

    Attributes:
        n_bytes: bytes that were written, before compression.
    """

    def __init__(
        self, place: Place, leaves: Sequence[MergedLeaf], *, in_database: bool, process: int
    ):
        """Opens the item, whose directory is there. The first process creates the arrays.

        Args:
            place: the item's directory.
            leaves: its leaves.
            in_database: whether arrays go to an OCDBT database.
            process: this process.
        """
        self._place, self._leaves = place, leaves
        self._context = ts.Context({**CONTEXT, **place.context_spec()})
        self._stores: dict[int, Any] = {}
        self._digests: dict[tuple[int, Box], int] = {}
        self._lock, self.n_bytes = threading.Lock(), 0
        self._deadline = Deadline(place.directory, place.timeout_s)
        self._deadline.begin()
        base = ts.KvStore.open(place.kvstore_spec(), context=self._context).result()
        mine = base / _database_of(process)
        self._arrays = database_in(mine, self._context, _NODE_BYTES) if in_database else base
        try:
            if process == 0:
                self.wait([self._create(leaf) for leaf in leaves])
        except BaseException:
            self.close()
            raise

    def _create(self, leaf: MergedLeaf) -> Any:
        key = f"{_prefix(leaf)}{leaf.metadata_name}"
        return self._arrays.write(key, json.dumps(leaf.metadata).encode())

    def write(self, leaf: int, box: Box, data: np.ndarray) -> Any:
        """Starts to write a box. Its memory must stay as it is until what is returned is done.

        Args:
            leaf: position of the leaf.
            box: whole chunks, up to the ends of the array.
            data: of its shape, in the dtype of the result.
        """
        store = self._opened(leaf)
        # Nodes are kept in the cache: memory must not be lent to it.
        lasting = data.nbytes > INLINE_BYTES
        future = store[box.index].write(data, can_reference_source_data_indefinitely=lasting)
        # While TensorStore is at work.
        chunks = chunks_in(box, self._leaves[leaf].shape, self._leaves[leaf].forms[0].chunk)
        digests = {(leaf, part): digest_of(data[part.relative_to(box)]) for part in chunks}
        with self._lock:
            self._digests |= digests
            self.n_bytes += data.nbytes
        return future

    def _opened(self, leaf: int) -> Any:
        with self._lock:
            if (store := self._stores.get(leaf)) is None:
                what = self._leaves[leaf]
                spec = {
                    "driver": what.forms[0].driver,
                    "metadata": what.metadata,
                    "store_data_equal_to_fill_value": True,
                }
                place = {"kvstore": self._arrays + _prefix(what), "context": self._context}
                opening = ts.open(spec, open=True, assume_metadata=True, **place)
                store = self._stores[leaf] = opening.result()
            return store

    def wait(self, futures: Iterable[Any]) -> None:
        """Waits until the storage has acknowledged some writes.

        Raises:
            SaveError: it refused one, or did not answer in time.
        """
        try:
            for future in futures:
                self._deadline.result_of(future)
        except (ValueError, OSError) as error:
            raise save_error(self._place.directory, error) from error

    def merge_databases(self, processes: int) -> None:
        """Makes the item's database of those of the processes, whose files it refers to.

        Raises:
            SaveError: the storage refused.
        """
        base = ts.KvStore.open(self._place.kvstore_spec(), context=self._context).result()
        parts = [
            database_in(base / _database_of(i), self._context, _NODE_BYTES)
            for i in range(processes)
        ]
        merge_databases(base, parts, self._context, self.wait)

    def digests(
        self, process: int, processes: int, files: Mapping[str, bytes], texts: Mapping[str, str]
    ) -> tuple[str, bytes]:
        """Returns name and content of the file of digests of what was written.

        Args:
            process: this process.
            processes: how many there are.
            files: the small files that it writes, by name.
            texts: the leaves that are strings, by name.
        """
        pieces = {
            Piece(leaf, 0, 0, box.start, box.shape, box.start): found
            for (leaf, box), found in self._digests.items()
        }
        slab = Slab("host", (), (), tuple(pieces), 0, 0)
        leaves = [
            Leaf(position, leaf.name, leaf.name, leaf.shape, leaf.dtype, None)
            for position, leaf in enumerate(self._leaves)
        ]
        template = DigestTemplate(
            Plan(tuple(leaves), (), (slab,)),
            tuple(leaf.dtype.name for leaf in self._leaves),
            use_ocdbt=self._arrays.base is not None,
            driver=self._leaves[0].forms[0].driver if self._leaves else "zarr",
            process=process,
            processes=tuple(range(processes)),
            others=(),
        )
        by_id = {id(piece): found for piece, found in pieces.items()}
        return template.fill(by_id, files, texts, self._place.directory)[:2]

    def close(self) -> None:
        """Ends what the storage was given."""
        self._deadline.end([])


def _prefix(leaf: MergedLeaf) -> str:
    return leaf.name if leaf.name.endswith("/") or not leaf.name else f"{leaf.name}/"


def _database_of(process: int) -> str:
    return f"{_paths.PROCESS_DIRECTORY}{process}/"
