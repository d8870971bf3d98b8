"""Host to storage: views of slabs go to TensorStore as they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from lazy_orbax import _orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.events import final_directory, step_of
from lazy_orbax.format import Format
from lazy_orbax.plan import Piece, Plan, Slab
from lazy_orbax.sync import Syncer

# A fresh context for each save, as stock Orbax has it: a shared cache would keep slabs alive.
# TensorStore is told not to sync: we do, beside the next slab, and before Orbax commits.
_CONTEXT = {
    "file_io_concurrency": {"limit": 128},
    "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
    "file_io_sync": False,
}


class Writer:
    """Writes one save of one item. Used by one thread at a time.

    The arrays given to `write` must stay alive and unchanged until `wait` returned for what
    `write` returned: TensorStore reads from them without a copy.
    """

    def __init__(self, plan: Plan, format_: Format, directory: str):
        """Opens the key-value stores in `directory`, which must exist.

        Args:
            plan: what is written.
            format_: how it is stored.
            directory: the item's (temporary) directory, or its `gs://` address.
        """
        self._plan, self._format, self._directory = plan, format_, directory
        self._context = ts.Context(_CONTEXT)
        self._stores: dict[int, Any] = {}
        self._files = self._open(format_.directory) if format_.is_primary or format_.files else None
        self._kvstores = [self._open(spec) for spec in format_.kvstores]
        self._syncer = Syncer(directory) if os.path.isabs(directory) else None

    def _open(self, spec: str) -> ts.KvStore:
        here = json.loads(
            spec.replace(_orbax.PLACEHOLDER_DIRECTORY, json.dumps(self._directory)[1:-1])
        )
        store = ts.KvStore.open(here, context=self._context).result()
        return store if store.path.endswith("/") or not store.path else store + "/"

    def write(self, pieces: Iterable[tuple[Piece, np.ndarray]]) -> list[Any]:
        """Starts writing pieces and returns TensorStore's futures."""
        futures: list[Any] = []
        for piece, view in pieces:
            store = self._stores.get(piece.leaf)
            if store is None:
                store = self._stores[piece.leaf] = self._open_leaf(piece.leaf, futures)
            futures.append(
                store[piece.index].write(view, can_reference_source_data_indefinitely=True)
            )
        return futures

    def _open_leaf(self, leaf: int, futures: list[Any]) -> ts.TensorStore:
        stored = self._format.leaves[leaf]
        kvstore = self._kvstores[stored.kvstore] + stored.prefix
        if self._format.is_primary:
            futures.append(kvstore.write(stored.metadata_key, stored.metadata))
        store = ts.open(
            stored.spec, kvstore=kvstore, context=self._context, open=True, assume_metadata=True
        ).result()
        return store if stored.cast_from is None else ts.cast(store, ts.dtype(stored.cast_from))

    def finish(self, custom_metadata: Any) -> None:
        """Writes the small files, and waits until everything is on storage."""
        futures: list[Any] = []
        if self._format.is_primary:
            for leaf in range(len(self._plan.leaves)):
                if leaf not in self._stores:
                    self._stores[leaf] = self._open_leaf(leaf, futures)
        if self._files is not None:
            for name, content in self._format.metadata_files(custom_metadata).items():
                futures.append(self._files.write(name, content))
        self.wait(futures)
        self._stores.clear()
        if self._syncer is not None:
            self._syncer.finish()

    def close(self) -> None:
        """Joins the threads that sync. A writer that was not finished left things unsynced."""
        if self._syncer is not None:
            self._syncer.close()

    def wait(self, futures: Sequence[Any], slab: Slab | None = None) -> None:
        """Waits for futures of `write`.

        Args:
            futures: what `write` returned.
            slab: what they are of, for the message.

        Raises:
            SaveError: the storage refused something.
        """
        for future in futures:
            try:
                future.result()
            except (ValueError, OSError) as error:
                leaf = self._leaf_at_fault(str(error), slab)
                raise save_error(self._directory, error, leaf=leaf) from error
        if slab is not None and self._syncer is not None:
            self._syncer.begin()

    def _leaf_at_fault(self, text: str, slab: Slab | None) -> str | None:
        """Returns the leaf whose path is in an error's text, else those that were written."""
        names = [self._plan.leaves[i].name for i in (slab.leaves if slab else self._stores)]
        named = [name for name in names if f"/{name}/" in text]
        if named:
            return max(named, key=len)
        return None if not names else f"{names[0]} and {len(names) - 1} others with it"


def save_error(directory: str, error: BaseException, *, leaf: str | None = None) -> SaveError:
    """Returns the `SaveError` for a failure while writing to `directory`."""
    text = str(error)
    if match := re.search(r"[\"']([^\"']*/[^\"']*)[\"']", text):
        file = match.group(1)
    else:
        file = getattr(error, "filename", None)
    return SaveError(
        text or type(error).__name__,
        step=step_of(final_directory(directory)),
        directory=directory,
        leaf=leaf,
        file=file,
        process=jax.process_index() if jax.process_count() > 1 else None,
    )
