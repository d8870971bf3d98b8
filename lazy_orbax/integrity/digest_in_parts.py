"""The digest of a piece on storage that is too large to be read at once."""

from __future__ import annotations

import math

import tensorstore as ts

from lazy_orbax.integrity import digest
from lazy_orbax.integrity.chunk_location import chunk_keys, chunk_shape, plain_bytes
from lazy_orbax.plan.boxes import Box, parts

PART_BYTES = 2**26


def digest_in_parts(store: ts.TensorStore, box: Box) -> int:
    """Returns the digest of a box, of which not all is in memory at once.

    A chunk that is stored as it lay in memory is read in parts. Any other is decoded as a whole.

    Args:
        store: an open array.
        box: a box of it.
    """
    chunk = chunk_shape(store)
    is_one = box.shape == chunk and all(a % n == 0 for a, n in zip(box.start, chunk, strict=True))
    found = _digest_of_chunk(store, box) if is_one else None
    if found is not None:
        return found
    hasher, itemsize = digest.hasher(), store.dtype.numpy_dtype.itemsize
    # Rows of whole chunks, where that is not too much.
    for part in parts(box.shape, itemsize, PART_BYTES, chunk):
        start = tuple(a + b for a, b in zip(box.start, part.start, strict=True))
        hasher.update(digest.bytes_of(store[Box(start, part.shape).index].read().result()))
    return hasher.intdigest()


def _digest_of_chunk(store: ts.TensorStore, box: Box) -> int | None:
    """Returns the digest of a chunk that is stored as plain bytes, without decoding it."""
    (key,) = chunk_keys(store, box)
    place, kvstore = plain_bytes(store, key), store.kvstore
    if place is None or kvstore is None:
        return None
    n_bytes = math.prod(box.shape) * store.dtype.numpy_dtype.itemsize
    hasher, end = digest.hasher(), place.start + n_bytes
    if place.stop not in (None, end):
        return None
    for first in range(place.start, end, PART_BYTES):
        # The last part has all the rest: there may be more than there should be.
        last = first + PART_BYTES if first + PART_BYTES < end else place.stop
        found = kvstore.read(key, byte_range=slice(first, last)).result()
        if found.state != "value":
            return None  # Nothing but the fill value, which is not stored.
        hasher.update(found.value)
    return hasher.intdigest()
