"""Chunks that are encoded in some way: TensorStore decodes each once.

Where it is known where they lie, they are read as all others are, and decoded from memory.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.boxes import Shape
from lazy_orbax.restore.chunk import Chunk, scatter
from lazy_orbax.storage.place import Place

# What TensorStore may hold of chunks that nobody has taken yet.
_MOST_BYTES = 2**27
_CACHE_BYTES = 2**27
# What is decoded at once, so that it is taken while it is in the processor's cache.
_STACK_BYTES = 2**20


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
        self._counting = threading.Lock()
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
                form, here = chunk.format, self._kvstore + prefix
                store = _opened(here, form, self._context, form.shape)
            while reading and n_bytes + chunk.format.chunk_bytes > _MOST_BYTES:
                n_bytes -= reading[0][0].format.chunk_bytes
                wrong.append(_taken(*reading.popleft()))
            n_bytes += chunk.format.chunk_bytes
            with self._counting:
                self.requests += 1
                self.n_bytes += chunk.format.chunk_bytes
            reading.append((chunk, _started(chunk, store[chunk.read.box.index])))
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
    alike: dict[ArrayFormat, list[tuple[Chunk, bytes | memoryview]]] = {}
    for one in chunks:
        alike.setdefault(one[0].format, []).append(one)
    wrong: list[Piece | None] = []
    for form, mine in alike.items():
        n_together = max(1, _STACK_BYTES // form.chunk_bytes) if form.chunk else 1
        for first in range(0, len(mine), n_together):
            wrong += _decoded_together(form, mine[first : first + n_together])
    return [piece for piece in wrong if piece is not None]


def _decoded_together(
    form: ArrayFormat, chunks: Sequence[tuple[Chunk, bytes | memoryview]]
) -> list[Piece | None]:
    """Decodes chunks of one form: one upon the other they are an array, which is read at once."""
    context, others = ts.Context(), (0,) * len(form.chunk[1:])
    memory = ts.KvStore.open("memory://", context=context).result()
    shape = (len(chunks) * form.chunk[0], *form.chunk[1:]) if form.chunk else ()
    store = _opened(memory, form, context, shape)
    keys = [form.key((i, *others) if form.chunk else ()) for i in range(len(chunks))]
    writing = [
        store.kvstore.write(key, bytes(content))
        for key, (_, content) in zip(keys, chunks, strict=True)
    ]
    for one in writing:
        one.result()
    data = np.reshape(store.read().result(), (len(chunks), *form.chunk))
    return [
        scatter(chunk, data[(i, *map(slice, chunk.read.box.shape))], is_checked=False)
        for i, (chunk, _) in enumerate(chunks)
    ]


def _opened(kvstore: ts.KvStore, form: ArrayFormat, context: ts.Context, shape: Shape) -> Any:
    """Returns an array of a known form."""
    metadata = {**form.metadata, "shape": shape}
    spec = {"driver": form.driver, "metadata": metadata, "fill_missing_data_reads": False}
    return ts.open(
        spec, kvstore=kvstore, context=context, open=True, read=True, assume_metadata=True
    ).result()


def _started(chunk: Chunk, stored: Any) -> Any:
    """Starts to decode a chunk, in its place if it goes there as it is."""
    home = _home(chunk)
    return stored.read() if home is None else ts.array(home).write(stored)


def _taken(chunk: Chunk, reading: Any) -> Piece | None:
    data, home = reading.result(), _home(chunk)
    if home is None:
        return scatter(chunk, np.asarray(data), is_checked=False)
    return chunk.piece if chunk.is_other(home) else None


def _home(chunk: Chunk) -> np.ndarray | None:
    if len(places := chunk.places) != 1:
        return None
    form = chunk.format
    return np.frombuffer(places[0], np.uint8).view(form.dtype).reshape(form.chunk)
