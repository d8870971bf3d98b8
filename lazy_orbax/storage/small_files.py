"""Small files in a local directory or a bucket. What is too large is not read."""

from __future__ import annotations

import os

from etils import epath

from lazy_orbax.storage.places import open_store, scheme_of

# Of a file of digests: about 60 bytes for each piece.
MOST_BYTES = 2**28


def size_of(directory: str, name: str) -> int | None:
    """Returns the size of a file in bytes; `None` if there is no such file."""
    path = epath.Path(directory) / name
    if not scheme_of(directory) and not os.path.isfile(path):  # A FIFO, say: reading would hang.
        return None
    return path.stat().length if path.is_file() else None


def read(directory: str, name: str) -> bytes:
    """Returns the content of a small file.

    Raises:
        OSError: it is not there, is no file, is too large, or the storage refused.
        ValueError: an object store refused.
    """
    size = size_of(directory, name)
    if size is None or size > MOST_BYTES:
        raise OSError("it is no file" if size is None else f"it has {size} bytes")
    if scheme_of(directory):  # What epath knows of its size may be of what was there before.
        return open_store(directory).read(name).result().value
    return (epath.Path(directory) / name).read_bytes()
