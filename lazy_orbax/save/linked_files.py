"""Files of an item that are what they are in the step before: linked, and not written again.

A hard link is a second name of a file. A step that has one is whole without the other step, for
stock Orbax as for us. Nobody changes such a file in place: TensorStore writes another, and renames.
A file that was changed since its digest was noted is not linked: it is no longer what was saved.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable

import tensorstore as ts

_log = logging.getLogger("lazy_orbax")


OpenEarlier = Callable[[bytes], tuple[ts.KvStore, ts.KvStore]]


class LinkedFiles:
    """Links files of an item to those of the step before.

    Attributes:
        earlier: the item in the step before.
        directory: the item's directory, which exists.
    """

    def __init__(self, earlier: str, directory: str, digests: str):
        """Links nothing yet.

        Args:
            earlier: the item in the step before.
            directory: the item's directory.
            digests: name of its file of digests, in the step before.

        Raises:
            OSError: that was deleted meanwhile.
        """
        self.earlier, self.directory = earlier, directory
        self._noted_ns = os.stat(f"{earlier}/{digests}").st_mtime_ns

    def metadata(self, key: str) -> bytes | None:
        """Returns what describes an array in the step before, where that is a file."""
        try:
            with open(f"{self.earlier}/{key}", "rb") as file:
                return file.read()
        except OSError:
            return None

    def link(self, key: str) -> bool:
        """Links a file. Returns whether that was done.

        Raises:
            OSError: it cannot be: deleted meanwhile, not stored, on another disk, too many links.
        """
        source, name = (f"{at}/{key}" for at in (self.earlier, self.directory))
        found = os.lstat(source)
        if not stat.S_ISREG(found.st_mode):
            return False
        if found.st_mtime_ns > self._noted_ns:
            _log.warning("%s was changed after it was saved. It is not linked.", source)
            return False
        os.makedirs(os.path.dirname(name), exist_ok=True)
        os.link(source, name, follow_symlinks=False)
        return True

    def finish(self, open_earlier: OpenEarlier) -> None:
        """Does nothing: a file that is there is read."""
