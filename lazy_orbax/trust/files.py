"""Which files an item's directory holds, and bounded reading of the small ones.

A file of a checkpoint may be a FIFO that hangs whoever opens it, a device without end, or larger
than memory. Links are followed (caches of downloaded models are made of them) and what they lead to
counts.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
import stat
from typing import Any

from etils import epath

from lazy_orbax.errors import MalformedCheckpointError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel = 2


def brief(value: Any) -> str:
    """Returns a value of any size and depth as a short ASCII text."""
    return _BRIEF.repr(value).encode("ascii", "backslashreplace").decode()


@dataclasses.dataclass(frozen=True)
class Files:
    """What lies in a local directory.

    Attributes:
        names: of the files that describe an array, as paths relative to the directory.
        sizes: the bytes of each file, by the same kind of path.
    """

    names: frozenset[str]
    sizes: dict[str, int]

    @property
    def longest_chunk(self) -> tuple[str, int]:
        """The largest of the other files further down, a chunk in plain Zarr, and its bytes."""
        chunks = ((s, n) for n, s in self.sizes.items() if "/" in n and n not in self.names)
        size, name = max(chunks, default=(0, ""))
        return name, size


def survey(directory: str, metadata_names: frozenset[str]) -> Files:
    """Looks at every file of a local directory without opening one.

    Args:
        directory: the item's directory.
        metadata_names: what the files are called that describe an array.

    Raises:
        MalformedCheckpointError: there is something else than files and directories.
    """
    names, sizes = set(), {}
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        for entry in os.scandir(os.path.join(directory, folder)):
            name = os.path.join(folder, entry.name)
            status = _status(entry, os.path.join(directory, name))
            if stat.S_ISDIR(status.st_mode):
                # A link may lead back up: nothing is looked at twice.
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    pending.append(name)
                continue
            sizes[name] = status.st_size
            if entry.name in metadata_names:
                names.add(name)
    return Files(frozenset(names), sizes)


def _status(entry: os.DirEntry[str], path: str) -> os.stat_result:
    try:
        status = entry.stat()
    except OSError as error:
        raise MalformedCheckpointError(
            path, f"a link to nowhere ({error.strerror})", "a file"
        ) from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        kind = stat.filemode(status.st_mode)[0]
        raise MalformedCheckpointError(
            path, f"a special file (type {kind!r})", "a regular file or a directory"
        )
    return status


def read_small(directory: epath.Path, name: str, limit_bytes: int) -> bytes | None:
    """Returns the content of a file, or `None` where there is none.

    Args:
        directory: the item's directory, local or an address.
        name: a path relative to it.
        limit_bytes: more is not read.

    Raises:
        MalformedCheckpointError: it is a directory, or larger than that.
    """
    try:
        with (directory / name).open("rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise MalformedCheckpointError(directory / name, "a directory", "a file") from error
    if len(content) > limit_bytes:
        raise MalformedCheckpointError(
            directory / name, f"more than {limit_bytes} bytes", "metadata of at most that"
        )
    return content
