"""The key-value stores of one item, open for one save of it."""

from __future__ import annotations

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.save.disk_format import Format, StoredLeaf
from lazy_orbax.storage.deadline import Deadline
from lazy_orbax.storage.places import place_of

# A fresh context for each save, as stock Orbax has it: a shared cache would keep slabs alive.
# TensorStore is told not to sync: we do, beside the next slab, and before Orbax commits.
CONTEXT = {
    "file_io_concurrency": {"limit": 128},
    "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
    "file_io_sync": False,
}


class ItemStores:
    """Where one save of an item writes. Whoever made it ends its `deadline`.

    Attributes:
        format: how the item is stored.
        place: the item's (temporary) directory.
        deadline: how long the storage may acknowledge nothing.
        files: the directory itself, for small files; `None` where this process writes none.
        arrays: what arrays are written to, in the order of `Format.kvstores`.
        may_hold_late_writes: whether a failed save may have written here after Orbax had emptied
            the directory.
    """

    def __init__(self, format_: Format, directory: str, *, timeout_s: float):
        """Opens them in `directory`, which must exist.

        Args:
            format_: how the item is stored.
            directory: the item's (temporary) directory, or its `gs://` address.
            timeout_s: most seconds in which the storage may acknowledge nothing.
        """
        self.format, self.place = format_, place_of(directory, timeout_s)
        self.deadline = Deadline(directory, timeout_s)
        self._context = ts.Context({**CONTEXT, **self.place.context_spec()})
        self.files: ts.KvStore | None = None
        self.arrays: list[ts.KvStore] = []
        self.may_hold_late_writes = self.deadline.begin()
        try:
            digests = format_.digests
            if format_.is_primary or format_.files or digests.process in digests.processes:
                self.files = self._open(format_.directory)
            self.arrays += map(self._open, format_.kvstores)
        except BaseException:
            self.deadline.end([])
            raise

    def _open(self, spec: str) -> ts.KvStore:
        here = self.place.kvstore_spec_like(spec)
        opening = ts.KvStore.open(here, context=self._context)
        store = self.deadline.result_of(opening)
        return store if store.path.endswith("/") or not store.path else store + "/"

    def open_earlier(self, manifest: bytes) -> tuple[ts.KvStore, ts.KvStore]:
        """Returns an older version of the database that this process writes, and that itself.

        Args:
            manifest: content of its manifest. Its values lie where those of the new one do, and a
                copy of one is a reference to it.
        """
        place = {"driver": "memory", "path": "earlier/"}
        memory = ts.KvStore.open(place, context=self._context).result()
        memory.write(_paths.MANIFEST, manifest).result()
        spec = {**self.place.kvstore_spec_like(self.format.kvstores[0]), "manifest": place}
        return ts.KvStore.open(spec, context=self._context).result(), self.arrays[0]

    def open_leaf(self, stored: StoredLeaf) -> ts.TensorStore:
        """Returns the array of a leaf, which takes what the leaf is on the host."""
        kvstore = self.arrays[stored.kvstore] + stored.prefix
        opening = ts.open(
            stored.spec, kvstore=kvstore, context=self._context, open=True, assume_metadata=True
        )
        store = self.deadline.result_of(opening)
        return store if stored.cast_from is None else ts.cast(store, ts.dtype(stored.cast_from))

    def late_writes(self) -> list[tuple[ts.KvStore, ts.KvStore.KeyRange]]:
        """Returns where the databases of a failed save may be, which OCDBT would read and extend.

        Everything else is written over.
        """
        if not self.may_hold_late_writes:
            return []
        everything = ts.KvStore.KeyRange()
        found = [(store.base, everything) for store in self.arrays if store.base is not None]
        if found and self.files is not None:
            merged = [("d/", "d0"), (_paths.MANIFEST, f"{_paths.MANIFEST}0")]
            found += [(self.files, ts.KvStore.KeyRange(*keys)) for keys in merged]
        return found
