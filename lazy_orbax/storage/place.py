"""What may be asked of the directory of a checkpoint, wherever it is: answered in `places.py`."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

from lazy_orbax.errors import OptionError
from lazy_orbax.storage.fsync import Inode, NothingToSync, Syncer

if TYPE_CHECKING:
    import tensorstore as ts

# A small file that is larger is not read. Of a file of digests: about 60 bytes for each piece.
MOST_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Place(abc.ABC):
    """A directory, wherever it is.

    Attributes:
        directory: its path, or its address.
        timeout_s: most seconds in which the storage may do nothing.
        needs_sync: whether what was written is durable only once it is synced.
        gives_up: whether TensorStore gives up by itself what the storage refuses: it tries again
            for a while. Else a write is soon done or refused, or hangs for ever.
        has_special_files: whether there may be links, pipes and devices.
    """

    directory: str
    timeout_s: float
    needs_sync: ClassVar[bool]
    gives_up: ClassVar[bool]
    has_special_files: ClassVar[bool]

    @property
    @abc.abstractmethod
    def path(self) -> str:
        """What TensorStore's errors call the directory."""

    @property
    @abc.abstractmethod
    def is_absolute(self) -> bool:
        """Whether it is the same directory in every working directory."""

    @property
    @abc.abstractmethod
    def absolute(self) -> str:
        """The directory, whatever the working directory is."""

    @property
    @abc.abstractmethod
    def appears_within_s(self) -> float:
        """Seconds in which a small file that Orbax is writing is there."""

    def as_path(self) -> Any:
        """Returns the directory as a path object, of `pathlib` or like those."""
        return pathlib.Path(self.directory)

    # For TensorStore.

    @abc.abstractmethod
    def stand_in(self) -> str:
        """Returns what stands for the directory, and every other of its kind, in a plan.

        Raises:
            OptionError: Orbax cannot write there.
        """

    def kvstore_spec_like(self, template: str) -> dict[str, Any]:
        """Returns a key-value store's spec with the directory in the place of its stand-in.

        Args:
            template: JSON that Orbax made for the stand-in of the directory.

        Raises:
            OptionError: the template is for a directory of another kind.
        """
        filled_in = self._filled_in(template)
        if filled_in is None:
            raise OptionError(
                f"{self.directory}: Orbax told where to save only after the save was planned for "
                "another kind of storage. Give the checkpointer the address itself."
            )
        return json.loads(filled_in)

    @abc.abstractmethod
    def _filled_in(self, template: str) -> str | None: ...

    @abc.abstractmethod
    def kvstore_spec(self) -> dict[str, Any]:
        """Returns the spec of the directory as a plain key-value store."""

    @abc.abstractmethod
    def context_spec(self) -> dict[str, Any]:
        """Returns what TensorStore is to be told of retries; nothing for a local directory."""

    @functools.cached_property
    def kvstore(self) -> ts.KvStore:
        """The directory as a plain key-value store."""
        import tensorstore as ts  # It takes a moment to import, and names and sizes need none.

        context = ts.Context(self.context_spec())
        return ts.KvStore.open(self.kvstore_spec(), context=context).result()

    # What lies there.

    @abc.abstractmethod
    def may_be_there(self) -> bool:
        """Whether there is such a directory, as far as that can be told at no cost."""

    @abc.abstractmethod
    def has(self, name: str) -> bool:
        """Whether something has this name."""

    @abc.abstractmethod
    def has_directory(self, name: str) -> bool:
        """Whether there is a directory of this name."""

    @abc.abstractmethod
    def names(self, folder: str) -> list[str]:
        """Returns the names of the files in a folder, in any order; none if there is no folder."""

    @abc.abstractmethod
    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes; `None` if there is no such file."""

    @abc.abstractmethod
    def listed(self) -> contextlib.AbstractContextManager[dict[str, int] | None]:
        """Gives the size of every file, by its path; `None` where no one request tells.

        Meanwhile nobody asks for these again.
        """

    @abc.abstractmethod
    def start_read(self, name: str, *, size: int, most_bytes: int) -> Any:
        """Starts to read a file. Returns a future of its content; of `None` if it is not there.

        Args:
            name: the file.
            size: its size in bytes, as it was told.
            most_bytes: if it has more by now, no more than one byte more is read.
        """

    def read(self, name: str) -> bytes:
        """Returns the content of a small file.

        Raises:
            OSError: it is not there, is no file, is too large, or the storage refused.
            ValueError: an object store refused.
        """
        if (content := self.read_if_there(name)) is None:
            raise OSError("it is no file")
        return content

    def read_if_there(self, name: str) -> bytes | None:
        """Returns the content of a small file; `None` if there is no such file.

        Raises:
            OSError: it is too large, or the storage refused.
            ValueError: an object store refused.
        """
        size = self.size(name)
        if size is None:
            return None
        if size > MOST_BYTES:
            raise OSError(f"it has {size} bytes")
        return self._content(name)

    @abc.abstractmethod
    def _content(self, name: str) -> bytes: ...

    def peek(self, name: str) -> bytes | None:
        """Returns the content of a small file; `None` if there is none.

        It may be written, or go, at this moment.

        Raises:
            OSError: it is no file, is too large, or the storage refused.
            ValueError: an object store refused.
        """
        try:
            return self.read(name) if self.has(name) else None
        except OSError:
            if self.has(name):
                raise
            return None  # Another program removed it, or a directory that it is in.

    @abc.abstractmethod
    def write(self, name: str, content: bytes) -> set[Inode]:
        """Writes a small file. Returns the directories that are to be synced for it."""

    @abc.abstractmethod
    def is_committed(self, children: Collection[str]) -> bool:
        """Whether nothing of what lies in a step's directory says that it was not committed."""

    # How much of it, and whether that is durable.

    @abc.abstractmethod
    def progress(self) -> int | None:
        """Returns how many bytes are there; `None` where that tells nothing of a large write."""

    @abc.abstractmethod
    def free_bytes(self) -> float:
        """Returns for how many bytes there is room."""

    @abc.abstractmethod
    def syncer(self, own: Collection[str]) -> Syncer | NothingToSync:
        """Returns what makes durable what is written there. See `Syncer`."""
