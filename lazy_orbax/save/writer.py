"""Host to storage: views of slabs go to TensorStore as they are."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.errors import SaveError
from lazy_orbax.integrity import digest
from lazy_orbax.integrity.proof import Evidence
from lazy_orbax.plan.slabs import Piece, Plan, Slab
from lazy_orbax.save.beside import Beside
from lazy_orbax.save.disk_format import Format
from lazy_orbax.save.item_stores import ItemStores
from lazy_orbax.save.linked_chunks import Links, links_to_earlier
from lazy_orbax.storage.fsync import Inode
from lazy_orbax.storage.save_error import save_error

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
        evidence: of what the caller's arrays held; what is written must be that.
        beside: what else takes the pieces.
    """

    def __init__(self, plan: Plan, format_: Format, directory: str, *, timeout_s: float):
        """Opens the key-value stores in `directory`, which must exist.

        Args:
            plan: what is written.
            format_: how it is stored.
            directory: the item's (temporary) directory, or its `gs://` address.
            timeout_s: most seconds in which the storage may acknowledge nothing.
        """
        self._plan = plan
        self._item = ItemStores(format_, directory, timeout_s=timeout_s)
        self._stores: dict[int, ts.TensorStore] = {}
        self._digests: dict[int, int] = {}
        self._unacknowledged: list[list[Request]] = []
        self.evidence: Evidence | None = None
        self._links: Links | None = None
        self.beside: Beside | None = None
        self._syncer = self._item.place.syncer(format_.own_directories)
        try:
            self._remove_late_writes()
        except BaseException:
            self.close()
            raise

    @property
    def gives_up(self) -> bool:
        """Whether what is not acknowledged ends by itself. See `Place.gives_up`."""
        return self._item.place.gives_up

    @property
    def synced_directories(self) -> set[Inode]:
        """Where `finish` synced everything, below a local directory."""
        return set(self._syncer.directories)

    def _remove_late_writes(self) -> None:
        requests = self._new_requests()
        for store, keys in self._item.late_writes():
            requests.append(Request(store.delete_range(keys), _paths.MANIFEST))
        self.wait(requests)

    @functools.partial(jax.profiler.annotate_function, name="lazy_orbax write")
    def write(self, pieces: Iterable[tuple[Piece, np.ndarray]]) -> list[Request]:
        """Starts writing pieces and returns what to `wait` for."""
        requests, unchanged = self._new_requests(), []
        for piece, view in pieces:
            if piece.leaf not in self._stores:
                self._stores[piece.leaf] = self._open_leaf(piece.leaf, requests)
            before = self._links.digest_of(piece) if self._links else None
            if before is None:
                self._start(piece, view, requests)
                self._take_digest(piece, view)  # While TensorStore is at work.
            elif self._take_digest(piece, view) == before:
                unchanged.append((piece, view))
            else:
                self._start(piece, view, requests)
        for piece, view in self._not_linked(unchanged):
            self._start(piece, view, requests)
        return requests

    def _start(self, piece: Piece, view: np.ndarray, requests: list[Request]) -> None:
        lasting = view.nbytes > _LARGEST_CACHED_BYTES
        store = self._stores[piece.leaf][piece.index]
        future = store.write(view, can_reference_source_data_indefinitely=lasting)
        requests.append(Request(future, self._plan.leaves[piece.leaf].name))

    def _take_digest(self, piece: Piece, view: np.ndarray) -> int:
        """Looks at a piece, and notes the digest of what it is on disk."""
        index = piece.index
        if self.evidence and (what := self.evidence.differs(piece, index, view)):
            raise self._error_of(self._plan.leaves[piece.leaf].name, what)
        if self.beside is not None:
            self.beside.put(piece, view)
        # What is cast on the way is hashed as it is read back.
        if (dtype := self._item.format.digests.casts[piece.leaf]) is not None:
            view = digest.cast(view, dtype)
            if self.evidence:
                self.evidence.is_cast(piece, index, view)
        self._digests[id(piece)] = found = digest.digest_of(view)
        return found

    def link_unchanged(self) -> None:
        """Lets `write` link what is the same in the committed step before.

        Raises:
            TimeoutError: the storage does not answer.
        """
        directory = self._item.place.directory

        def look() -> None:
            self._links = links_to_earlier(directory, self._plan, self._item.format)

        self._item.deadline.run(look, "lazy_orbax-link")

    @property
    def bytes_linked(self) -> int:
        """How many bytes were not written, because they are in an earlier step."""
        return self._links.n_bytes if self._links else 0

    def _not_linked(
        self, unchanged: Sequence[tuple[Piece, np.ndarray]]
    ) -> list[tuple[Piece, np.ndarray]]:
        """Links what did not change. Returns what could not be linked, and is to be written."""
        links, left = self._links, []
        if links is None or not unchanged:
            return left

        def link() -> None:
            left.extend(one for one in unchanged if not links.link(one[0], one[1].nbytes))

        self._item.deadline.run(link, "lazy_orbax-link")
        return left

    def _finish_links(self) -> None:
        if (links := self._links) is None:
            return
        finish = functools.partial(links.finish, self._item.open_earlier)
        try:
            self._item.deadline.run(finish, "lazy_orbax-link")
        except (ValueError, OSError) as error:
            raise save_error(self._item.place.directory, error) from error

    def _error_of(self, leaf: str, what: str) -> SaveError:
        return save_error(self._item.place.directory, ValueError(what), leaf=leaf)

    def _new_requests(self) -> list[Request]:
        requests: list[Request] = []
        self._unacknowledged.append(requests)
        return requests

    def _open_leaf(self, leaf: int, requests: list[Request]) -> ts.TensorStore:
        stored = self._item.format.leaves[leaf]
        if self._item.format.is_primary:
            key = stored.prefix + stored.metadata_key
            future = self._item.arrays[stored.kvstore].write(key, stored.metadata)
            requests.append(Request(future, key))
        return self._item.open_leaf(stored)

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
        if self.evidence and (leaf := self.evidence.conclude()) is not None:
            raise self._error_of(leaf, "a piece of it was not written")
        if self.beside is not None:  # All pieces were handed over, and storage may take its time.
            self.beside.finish()
        requests = self._new_requests()
        if self._item.format.is_primary:
            for leaf in range(len(self._plan.leaves)):
                if leaf not in self._stores:
                    self._stores[leaf] = self._open_leaf(leaf, requests)
        if self._item.place.has_special_files:
            self.wait(requests)  # What a later step may link is older than its digests.
            requests = self._new_requests()
        self._finish_links()
        files = self._item.format.metadata_files(custom_metadata)
        fingerprints = self.evidence.found if self.evidence else None
        ours, digests, fingerprint = self._item.format.digests.fill(
            self._digests, files, texts, self._item.place.directory, fingerprints
        )
        if self._item.files is not None:
            for name, content in {**files, ours: digests}.items():
                requests.append(Request(self._item.files.write(name, content), name))
        self.wait(requests)
        self._stores.clear()
        self._syncer.finish()
        return fingerprint

    def close(self) -> None:
        """Gives up what is not acknowledged, and joins the threads that sync.

        A writer that was not finished left things unsynced.
        """
        futures = [request.future for some in self._unacknowledged for request in some]
        self._unacknowledged.clear()
        self._item.deadline.end([future for future in futures if not future.done()])
        self._syncer.close()

    @functools.partial(jax.profiler.annotate_function, name="lazy_orbax wait for storage")
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
                self._item.deadline.result_of(future)
            except (ValueError, OSError) as error:
                file = f"{self._item.place.directory}/{key}"
                leaf = self._leaf_at_fault(f"{file}/ {error}", slab)
                raise save_error(self._item.place.directory, error, leaf=leaf, file=file) from error
        self._unacknowledged = [some for some in self._unacknowledged if some is not requests]
        if slab is not None:
            self._syncer.begin()

    def _leaf_at_fault(self, text: str, slab: Slab | None) -> str | None:
        """Returns the leaf whose path is in an error's text, else those that were written."""
        names = [self._plan.leaves[i].name for i in (slab.leaves if slab else self._stores)]
        named = [name for name in names if f"/{name}/" in text]
        if named:
            return max(named, key=len)
        return None if not names else f"{names[0]} and {len(names) - 1} others with it"
