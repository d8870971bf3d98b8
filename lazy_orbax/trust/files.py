"""Which files an item's directory holds, and bounded reading of the small ones.

A file of a checkpoint may be a FIFO that hangs whoever opens it, a device without end, or larger
than memory. Links are followed (caches of downloaded models are made of them) and what they lead to
counts.
"""

from __future__ import annotations

import os
import reprlib
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.storage.place import Place

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel = 2


def brief(value: Any) -> str:
    """Returns a value of any size and depth as a short ASCII text."""
    return _BRIEF.repr(value).encode("ascii", "backslashreplace").decode()


def survey(directory: str) -> dict[str, int]:
    """Looks at every file of a local directory without opening one.

    Args:
        directory: the item's directory.

    Returns:
        The bytes of each file, by its path relative to the directory.

    Raises:
        MalformedCheckpointError: there is something else than files and directories.
    """
    sizes: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    # A list and no recursion: how deep directories lie is not ours to say.
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(os.path.join(directory, folder)) as scanned:
            entries = list(scanned)
        for entry in entries:
            name = os.path.join(folder, entry.name)
            status = _status(entry, os.path.join(directory, name))
            if stat.S_ISDIR(status.st_mode):
                # A link may lead back up: nothing is looked at twice.
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    pending.append(name)
                continue
            sizes[name] = status.st_size
    return sizes


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


class ItemFiles:
    """The files of an item: how large they are, and what is in the small ones.

    Each is read once, and none that is larger than it may be.

    Attributes:
        place: the item's directory.
        sizes: bytes of each file, by its path relative to the directory; `None` where nobody could
            list them. Files that a local directory has twice, by a link, are here once.
    """

    def __init__(self, place: Place, sizes: Mapping[str, int] | None = None):
        self.place, self.sizes = place, sizes
        self._asked: dict[str, int | None] = {}
        self._reading: dict[str, Any] = {}
        self._contents: dict[str, bytes | None] = {}

    def names(self, folder: str) -> list[str]:
        """Returns the paths of the files that lie in a folder itself, in order."""
        if self.sizes is None or self.place.has_special_files:
            inside = self.place.names(folder)
        else:
            start = f"{folder}/"
            inside = [n[len(start) :] for n in self.sizes if n.startswith(start)]
        return [f"{folder}/{name}" for name in sorted(inside) if "/" not in name]

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; `None` if there is no such file."""
        if (content := self._contents.get(name)) is not None:
            return len(content)
        if self.sizes is not None and (name in self.sizes or not self.place.has_special_files):
            return self.sizes.get(name)
        if name not in self._asked:
            self._asked[name] = self.place.size(name)
        return self._asked[name]

    def read_ahead(self, names: Iterable[str], limit_bytes: int) -> None:
        """Starts to read those of some files that are there and not too large."""
        for name in names:
            if self.is_begun(name):
                continue
            size = self.size(name)
            if size is not None and size <= limit_bytes:
                self._reading[name] = self.place.start_read(name, size=size, most_bytes=limit_bytes)

    def is_begun(self, name: str) -> bool:
        """Whether all of a file is being read, or was."""
        return name in self._reading or name in self._contents

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """Returns the content of a file, or `None` where there is none.

        Args:
            name: a path relative to the directory.
            limit_bytes: more is not read.

        Raises:
            MalformedCheckpointError: it is a directory, or larger than that.
            OSError: the storage refused.
            ValueError: an object store refused.
        """
        content = self._contents.get(name, ...)
        if content is ...:
            self.read_ahead([name], limit_bytes)
            if (size := self.size(name)) is not None and size > limit_bytes:
                raise self._too_large(name, limit_bytes)
            if size is None and self.place.has_special_files and self.place.has_directory(name):
                raise MalformedCheckpointError(self.path(name), "a directory", "a file")
            reading = self._reading.pop(name, None)
            content = self._contents[name] = None if reading is None else reading.result()
        if content is not None and len(content) > limit_bytes:
            raise self._too_large(name, limit_bytes)
        return content

    def forget(self) -> None:
        """Gives back the memory of what was read. Who wants a file again has it read again."""
        self._contents.clear()

    def path(self, name: str) -> str:
        """Returns where a file is, for errors."""
        return f"{self.place.directory.rstrip('/')}/{name}"

    def _too_large(self, name: str, limit_bytes: int) -> MalformedCheckpointError:
        return MalformedCheckpointError(
            self.path(name), f"more than {limit_bytes} bytes", "metadata of at most that"
        )
