"""Host to storage: views of slabs go to TensorStore as they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity import digest
from lazy_orbax.integrity.proof import Evidence
from lazy_orbax.plan.slabs import Piece, Plan, Slab
from lazy_orbax.save.disk_format import Format
from lazy_orbax.storage import places
from lazy_orbax.storage.deadline import Deadline
from lazy_orbax.storage.fsync import Inode, Syncer
from lazy_orbax.storage.save_error import save_error

# A fresh context for each save, as stock Orbax has it: a shared cache would keep slabs alive.
# TensorStore is told not to sync: we do, beside the next slab, and before Orbax commits.
CONTEXT = {
    "file_io_concurrency": {"limit": 128},
    "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
    "file_io_sync": False,
}
# OCDBT keeps values as small as this (Orbax sets 1 KiB) in nodes, and nodes in its cache: it would
# refer to a slab for as long as the save takes.
_LARGEST_CACHED_BYTES = 2**10


class Request(NamedTuple):
    """A write that TensorStore was given, and where it goes below the item's directory."""

    future: Any
    key: str


class Writer:
    """Writes one save of one item. Used by one thread at a time.

    The arrays given to `write` must stay alive and unchanged until `wait` returned for what
    `write` returned: TensorStore reads from them without a copy.

    Attributes:
        is_local: whether that is a directory, and not in an object store.
        synced_directories: where `finish` synced everything, below a local directory.
        evidence: of what the caller's arrays held; what is written must be that.
    """

    def __init__(self, plan: Plan, format_: Format, directory: str, *, timeout_s: float):
        """Opens the key-value stores in `directory`, which must exist.

        Args:
            plan: what is written.
            format_: how it is stored.
            directory: the item's (temporary) directory, or its `gs://` address.
            timeout_s: most seconds in which the storage may acknowledge nothing.
        """
        self._plan, self._format, self._directory = plan, format_, directory
        self._deadline = Deadline(directory, timeout_s)
        remote = places.context_spec(directory, timeout_s)
        self._context = ts.Context({**CONTEXT, **remote})
        self._stores: dict[int, Any] = {}
        self._digests: dict[int, int] = {}
        self._unacknowledged: list[list[Request]] = []
        self._files: ts.KvStore | None = None
        self._kvstores: list[ts.KvStore] = []
        self.synced_directories: set[Inode] = set()
        self.evidence: Evidence | None = None
        self.is_local = os.path.isabs(directory)
        self._syncer = (
            Syncer(directory, format_.own_directories, timeout_s=timeout_s)
            if self.is_local
            else None
        )
        may_hold_late_writes = self._deadline.begin()
        try:
            if format_.is_primary or format_.files:
                self._files = self._open(format_.directory)
            self._kvstores += map(self._open, format_.kvstores)
            if may_hold_late_writes:
                self._remove_late_writes()
        except BaseException:
            self.close()
            raise

    def _open(self, spec: str) -> ts.KvStore:
        here = places.kvstore_spec(spec, self._directory)
        opening = ts.KvStore.open(here, context=self._context)
        store = self._deadline.result_of(opening)
        return store if store.path.endswith("/") or not store.path else store + "/"

    def _remove_late_writes(self) -> None:
        """Removes the databases that a failed save wrote to after Orbax emptied the directory.

        OCDBT would read and extend them. Everything else is written over.
        """
        everything = ts.KvStore.KeyRange()
        removals = [(store.base, everything) for store in self._kvstores if store.base is not None]
        if removals and self._files is not None:
            merged = [("d/", "d0"), (_paths.MANIFEST, f"{_paths.MANIFEST}0")]
            removals += [(self._files, ts.KvStore.KeyRange(*keys)) for keys in merged]
        requests = self._new_requests()
        for store, keys in removals:
            requests.append(Request(store.delete_range(keys), _paths.MANIFEST))
        self.wait(requests)

    def write(self, pieces: Iterable[tuple[Piece, np.ndarray]]) -> list[Request]:
        """Starts writing pieces and returns what to `wait` for."""
        requests, casts = self._new_requests(), self._format.digests.casts
        for piece, view in pieces:
            store = self._stores.get(piece.leaf)
            if store is None:
                store = self._stores[piece.leaf] = self._open_leaf(piece.leaf, requests)
            lasting = view.nbytes > _LARGEST_CACHED_BYTES
            index = piece.index
            future = store[index].write(view, can_reference_source_data_indefinitely=lasting)
            requests.append(Request(future, self._plan.leaves[piece.leaf].name))
            # While TensorStore is at work.
            if self.evidence and (what := self.evidence.differs(piece, index, view)):
                raise self._error_of(self._plan.leaves[piece.leaf].name, what)
            # What is cast on the way is hashed as it is read back.
            if (dtype := casts[piece.leaf]) is not None:
                view = digest.cast(view, dtype)
                if self.evidence:
                    self.evidence.is_cast(piece, index, view)
            self._digests[id(piece)] = digest.digest_of(view)
        return requests

    def _error_of(self, leaf: str, what: str) -> SaveError:
        return save_error(self._directory, ValueError(what), leaf=leaf)

    def _new_requests(self) -> list[Request]:
        requests: list[Request] = []
        self._unacknowledged.append(requests)
        return requests

    def _open_leaf(self, leaf: int, requests: list[Request]) -> ts.TensorStore:
        stored = self._format.leaves[leaf]
        kvstore = self._kvstores[stored.kvstore] + stored.prefix
        if self._format.is_primary:
            future = kvstore.write(stored.metadata_key, stored.metadata)
            requests.append(Request(future, stored.prefix + stored.metadata_key))
        opening = ts.open(
            stored.spec, kvstore=kvstore, context=self._context, open=True, assume_metadata=True
        )
        store = self._deadline.result_of(opening)
        return store if stored.cast_from is None else ts.cast(store, ts.dtype(stored.cast_from))

    def finish(self, custom_metadata: Any, texts: Mapping[str, str]) -> str:
        """Writes the small files, and waits until everything is durable.

        In a local directory that means synced, file by file and directory by directory. In an
        object store it means that every write was acknowledged: there is nothing to sync.

        Args:
            custom_metadata: JSON-serializable, stored beside the tree.
            texts: leaves that are strings, by name. Orbax writes them; their digests are ours.

        Returns:
            A fingerprint of all that this process wrote.

        Raises:
            SaveError: the storage refused something, or did not answer in time.
        """
        if self.evidence and (leaf := self.evidence.missing()) is not None:
            raise self._error_of(leaf, "a piece of it was not written")
        requests = self._new_requests()
        if self._format.is_primary:
            for leaf in range(len(self._plan.leaves)):
                if leaf not in self._stores:
                    self._stores[leaf] = self._open_leaf(leaf, requests)
        files = self._format.metadata_files(custom_metadata)
        fingerprints = self.evidence.found if self.evidence else None
        ours, digests, fingerprint = self._format.digests.fill(
            self._digests, files, texts, self._directory, fingerprints
        )
        if self._files is not None:
            for name, content in {**files, ours: digests}.items():
                requests.append(Request(self._files.write(name, content), name))
        self.wait(requests)
        self._stores.clear()
        if self._syncer is not None:
            self._syncer.finish()
            self.synced_directories = self._syncer.directories
        return fingerprint

    def close(self) -> None:
        """Gives up what is not acknowledged, and joins the threads that sync.

        A writer that was not finished left things unsynced.
        """
        futures = [request.future for some in self._unacknowledged for request in some]
        self._unacknowledged.clear()
        self._deadline.end([future for future in futures if not future.done()])
        if self._syncer is not None:
            self._syncer.close()

    def wait(self, requests: Sequence[Request], slab: Slab | None = None) -> None:
        """Waits until the storage has acknowledged what `write` began.

        Args:
            requests: what `write` returned.
            slab: what they are of, for the message.

        Raises:
            SaveError: the storage refused something, or did not answer in time.
        """
        for future, key in requests:
            try:
                self._deadline.result_of(future)
            except (ValueError, OSError) as error:
                file = f"{self._directory}/{key}"
                leaf = self._leaf_at_fault(f"{file}/ {error}", slab)
                raise save_error(self._directory, error, leaf=leaf, file=file) from error
        self._unacknowledged = [some for some in self._unacknowledged if some is not requests]
        if slab is not None and self._syncer is not None:
            self._syncer.begin()

    def _leaf_at_fault(self, text: str, slab: Slab | None) -> str | None:
        """Returns the leaf whose path is in an error's text, else those that were written."""
        names = [self._plan.leaves[i].name for i in (slab.leaves if slab else self._stores)]
        named = [name for name in names if f"/{name}/" in text]
        if named:
            return max(named, key=len)
        return None if not names else f"{names[0]} and {len(names) - 1} others with it"
