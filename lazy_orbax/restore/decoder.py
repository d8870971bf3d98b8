"""Chunks that are encoded in some way: TensorStore decodes each once.

Where it is known where they lie, they are read as all others are, and decoded from memory.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.restore.array_format import ArrayFormat
from lazy_orbax.restore.reader import Chunk, scatter
from lazy_orbax.storage.place import Place

# What TensorStore may hold of chunks that nobody has taken yet.
_MOST_BYTES = 2**27
_CACHE_BYTES = 2**27


class Decoder:
    """The arrays of an item, decoded by TensorStore. Nothing is opened before it is asked for.

    Attributes:
        requests: how many chunks were read.
        n_bytes: how many bytes they have, decoded.
    """

    def __init__(self, place: Place, *, in_database: bool):
        """Notes where the arrays are.

        Args:
            place: the item's directory.
            in_database: whether they are in an OCDBT database, and not in a directory each.
        """
        cache = {"total_bytes_limit": _CACHE_BYTES}
        spec = {"cache_pool#ocdbt": cache, **place.context_spec()}
        self._place, self._context, self._in_database = place, ts.Context(spec), in_database
        self.requests = self.n_bytes = 0

    @functools.cached_property
    def _kvstore(self) -> ts.KvStore:
        base = self._place.kvstore_spec()
        spec = {"driver": "ocdbt", "base": base} if self._in_database else base
        return ts.KvStore.open(spec, context=self._context).result()

    def read(self, chunks: Iterable[Chunk]) -> list[Piece]:
        """Reads chunks, and puts them in their places.

        Raises:
            ValueError: one is missing, or cannot be decoded.
            OSError: the storage refused.
        """
        wrong: list[Piece | None] = []
        reading: collections.deque[tuple[Chunk, Any]] = collections.deque()
        n_bytes, leaf, store = 0, None, None
        for chunk in chunks:
            if store is None or chunk.leaf != leaf:
                leaf = chunk.leaf
                prefix = leaf if leaf.endswith("/") or not leaf else f"{leaf}/"
                store = _opened(self._kvstore + prefix, chunk.format, self._context)
            while reading and n_bytes + chunk.format.chunk_bytes > _MOST_BYTES:
                n_bytes -= reading[0][0].format.chunk_bytes
                wrong.append(_taken(*reading.popleft()))
            n_bytes += chunk.format.chunk_bytes
            self.requests, self.n_bytes = self.requests + 1, self.n_bytes + chunk.format.chunk_bytes
            reading.append((chunk, store[chunk.read.box.index].read()))
        while reading:
            wrong.append(_taken(*reading.popleft()))
        return [piece for piece in wrong if piece is not None]


def decode(chunks: Sequence[tuple[Chunk, bytes | memoryview]]) -> list[Piece]:
    """Decodes chunks, and puts them in their places.

    Args:
        chunks: each with what is stored.

    Returns:
        The pieces that are not what was saved.

    Raises:
        ValueError: one cannot be decoded.
    """
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    stores: dict[str, Any] = {}
    for chunk, content in chunks:
        if (store := stores.get(chunk.leaf)) is None:
            here = memory + f"{len(stores)}/"
            store = stores[chunk.leaf] = _opened(here, chunk.format, context)
        store.kvstore.write(chunk.format.key(chunk.read.position), bytes(content)).result()
    reading = [stores[chunk.leaf][chunk.read.box.index].read() for chunk, _ in chunks]
    found = [_taken(chunk, one) for (chunk, _), one in zip(chunks, reading, strict=True)]
    return [piece for piece in found if piece is not None]


def _opened(kvstore: ts.KvStore, form: ArrayFormat, context: ts.Context) -> Any:
    """Returns an array whose metadata are known."""
    spec = {"driver": form.driver, "metadata": form.metadata, "fill_missing_data_reads": False}
    return ts.open(
        spec, kvstore=kvstore, context=context, open=True, read=True, assume_metadata=True
    ).result()


def _taken(chunk: Chunk, reading: Any) -> Piece | None:
    data = np.asarray(reading.result())
    return scatter(chunk, data, is_checked=False)
