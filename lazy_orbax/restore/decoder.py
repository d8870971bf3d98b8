"""Reads chunks that are encoded in some way: TensorStore decodes each once."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable
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

    def _opened(self, leaf: str, form: ArrayFormat) -> Any:
        prefix = leaf if leaf.endswith("/") or not leaf else f"{leaf}/"
        spec = {
            "driver": form.driver,
            "metadata": form.metadata,
            "fill_missing_data_reads": False,
        }
        try:
            return ts.open(
                spec,
                kvstore=self._kvstore + prefix,
                context=self._context,
                open=True,
                read=True,
                assume_metadata=True,
            )
        except (OverflowError, TypeError) as error:  # What is in it is no JSON of TensorStore's.
            raise ValueError(f"leaf {leaf} cannot be opened: {error}") from error

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
                leaf, store = chunk.leaf, self._opened(chunk.leaf, chunk.format).result()
            while reading and n_bytes + chunk.format.chunk_bytes > _MOST_BYTES:
                n_bytes -= reading[0][0].format.chunk_bytes
                wrong.append(_taken(*reading.popleft()))
            n_bytes += chunk.format.chunk_bytes
            self.requests, self.n_bytes = self.requests + 1, self.n_bytes + chunk.format.chunk_bytes
            reading.append((chunk, store[chunk.read.box.index].read()))
        while reading:
            wrong.append(_taken(*reading.popleft()))
        return [piece for piece in wrong if piece is not None]


def _taken(chunk: Chunk, reading: Any) -> Piece | None:
    data = np.asarray(reading.result())
    return scatter(chunk, data, is_checked=False)
