"""Where a checkpoint goes: a local directory or an object store. Nobody else asks which it is.

A write that an object store has acknowledged is durable: there is nothing to sync, and an object
appears whole or not at all. What may fail is the way there: `deadline.py`.
"""

# ruff: noqa: D102 - `Place` says what each answers.

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Collection
from typing import Any, NamedTuple

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError
from lazy_orbax.storage import bucket_listing
from lazy_orbax.storage.fsync import Inode, NothingToSync, Syncer, inode_of
from lazy_orbax.storage.place import Place

# They stand for the item's directory in everything that is kept from save to save.
_DIRECTORY = "lazy-orbax-directory"
_BUCKET = "lazy-orbax-bucket"

# `LazyOptions.storage_timeout_s` of who reads without options.
STORAGE_TIMEOUT_S = 300.0
# The share of the deadline in which TensorStore may try again: its own error says which object it
# was and what the server answered, so it should come before ours.
_RETRY_SHARE = 2 / 3
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 32.0


class Done(NamedTuple):
    """A future that is done."""

    value: Any

    def result(self) -> Any:
        """Returns the outcome."""
        return self.value


class _Content(NamedTuple):
    """A future of what TensorStore reads."""

    reading: Any

    def result(self) -> bytes | None:
        found = self.reading.result()
        return bytes(found.value) if found.state == "value" else None


class LocalPlace(Place):
    """A local directory, which may be on a network file system."""

    needs_sync, gives_up, has_special_files = True, False, True

    @property
    def appears_within_s(self) -> float:
        return 0.5

    @property
    def path(self) -> str:
        return self.directory

    @property
    def is_absolute(self) -> bool:
        return os.path.isabs(self.directory)

    @property
    def absolute(self) -> str:
        return os.path.abspath(self.directory)

    def stand_in(self) -> str:
        return f"/{_DIRECTORY}"

    def _filled_in(self, template: str) -> str | None:
        if _BUCKET in template:
            return None
        path = _paths.without_dots(self.directory)
        return template.replace(f"/{_DIRECTORY}", _as_json(path))

    def kvstore_spec(self) -> dict[str, Any]:
        path = _paths.without_dots(self.directory)
        return {"driver": "file", "path": path.rstrip("/") + "/"}

    def context_spec(self) -> dict[str, Any]:
        return {}

    def may_be_there(self) -> bool:
        return os.path.isdir(self.directory)

    def has(self, name: str) -> bool:
        return os.path.lexists(self._at(name))

    def has_directory(self, name: str) -> bool:
        return os.path.isdir(self._at(name))

    def names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self._at(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        path = self._at(name)  # A FIFO, say, is no file: reading it would hang.
        return os.path.getsize(path) if os.path.isfile(path) else None

    def listed(self) -> contextlib.AbstractContextManager[dict[str, int] | None]:
        return contextlib.nullcontext()

    def start_read(self, name: str, *, size: int, most_bytes: int) -> Done:
        try:
            with open(self._at(name), "rb") as file:  # Its size may have been an old one.
                return Done(file.read(min(os.fstat(file.fileno()).st_size, most_bytes + 1)))
        except FileNotFoundError:
            return Done(None)

    def _content(self, name: str) -> bytes:
        with open(self._at(name), "rb") as file:
            return file.read()

    def write(self, name: str, content: bytes) -> set[Inode]:
        with open(self._at(name), "wb") as file:
            file.write(content)
        return {inode_of(os.path.dirname(self._at(name)))}

    def is_committed(self, children: Collection[str]) -> bool:
        return True  # Its own name would say so.

    def progress(self) -> int | None:
        return sum(
            os.stat(os.path.join(path, name)).st_size
            for path, _, names in os.walk(self.directory)
            for name in names
        )

    def free_bytes(self) -> float:
        return shutil.disk_usage(self.directory).free

    def syncer(self, own: Collection[str]) -> Syncer:
        return Syncer(self.directory, own, timeout_s=self.timeout_s)

    def _at(self, name: str) -> str:
        return os.path.join(self.directory, name)


class BucketPlace(Place):
    """A directory in an object store, such as `gs://bucket/path`."""

    needs_sync, gives_up, has_special_files = False, True, False

    @property
    def _scheme(self) -> str:
        return scheme_of(self.directory)

    @property
    def _bucket(self) -> str:
        return self.directory.removeprefix(f"{self._scheme}://").partition("/")[0]

    @property
    def path(self) -> str:
        return self.directory.removeprefix(f"{self._scheme}://").partition("/")[2]

    @property
    def is_absolute(self) -> bool:
        return True

    @property
    def absolute(self) -> str:
        return self.directory

    @property
    def appears_within_s(self) -> float:
        return min(5.0, self.timeout_s / 2)

    def as_path(self) -> Any:
        from etils import epath  # Whoever reads a local directory need not wait for it.

        return epath.Path(self.directory)

    def stand_in(self) -> str:
        from lazy_orbax._orbax import on_disk, symbols

        address = f"{self._scheme}://{_BUCKET}/{_DIRECTORY}"
        if on_disk.directory_kvstore_spec(address).get("bucket") != _BUCKET:
            raise OptionError(
                f"{self.directory}: orbax-checkpoint {symbols.ocp.__version__} does not write to "
                f"{self._scheme}:// (it would take the address for a local path). Use gs:// or a "
                "local directory, which may be a mounted bucket."
            )
        return address

    def _filled_in(self, template: str) -> str | None:
        if _BUCKET not in template:
            return None
        in_bucket = template.replace(_BUCKET, _as_json(self._bucket))
        return in_bucket.replace(_DIRECTORY, _as_json(self.path))

    def kvstore_spec(self) -> dict[str, Any]:
        driver = {"gs": "gcs"}.get(self._scheme, self._scheme)
        return {"driver": driver, "bucket": self._bucket, "path": self.path.rstrip("/") + "/"}

    def context_spec(self) -> dict[str, Any]:
        # How many requests run at once stays TensorStore's: `TENSORSTORE_GCS_REQUEST_CONCURRENCY`
        # or 32.
        first_s = min(_FIRST_DELAY_S, self.timeout_s / 32)
        longest_s = min(_LONGEST_DELAY_S, self.timeout_s / 8)
        tries, total_s = 0, 0.0
        while total_s <= self.timeout_s * _RETRY_SHARE:
            total_s += min(first_s * 2**tries, longest_s) + first_s  # The last is the jitter.
            tries += 1
        retries = {
            "max_retries": tries - 1,
            "initial_delay": f"{round(first_s * 1000)}ms",
            "max_delay": f"{round(longest_s * 1000)}ms",
        }
        return {f"{'gcs' if self._scheme == 'gs' else self._scheme}_request_retries": retries}

    def may_be_there(self) -> bool:
        return True

    def has(self, name: str) -> bool:
        return self.size(name) is not None

    def has_directory(self, name: str) -> bool:
        return bool((self.kvstore / f"{name}/").list().result())

    def names(self, folder: str) -> list[str]:
        here = self.kvstore / f"{folder}/"
        return [name.decode() for name in here.list().result() if b"/" not in name]

    def size(self, name: str) -> int | None:
        try:
            found = (self.as_path() / name).stat()
        except FileNotFoundError:
            return None
        return None if found.is_directory else found.length

    def listed(self) -> contextlib.AbstractContextManager[dict[str, int] | None]:
        if self._scheme != "gs":
            return contextlib.nullcontext()
        return bucket_listing.listed(self.directory)

    def start_read(self, name: str, *, size: int, most_bytes: int) -> _Content | Done:
        if not size:
            return Done(b"")
        return _Content(self.kvstore.read(name, byte_range=slice(0, size)))

    def _content(self, name: str) -> bytes:
        # What epath knows of its size may be of what was there before.
        return self.kvstore.read(name).result().value

    def peek(self, name: str) -> bytes | None:
        found = self.kvstore.read(name).result()
        return found.value if found.state == "value" else None

    def write(self, name: str, content: bytes) -> set[Inode]:
        self.kvstore.write(name, content).result()
        return set()

    def is_committed(self, children: Collection[str]) -> bool:
        return _paths.COMMITTED in children

    def progress(self) -> int | None:
        return None

    def free_bytes(self) -> float:
        return math.inf

    def syncer(self, own: Collection[str]) -> NothingToSync:
        return NothingToSync()


def place_of(directory: str, timeout_s: float = STORAGE_TIMEOUT_S) -> Place:
    """Returns what a directory is.

    Args:
        directory: its path, or its address.
        timeout_s: most seconds in which the storage may do nothing.
    """
    return (BucketPlace if scheme_of(directory) else LocalPlace)(directory, timeout_s)


def scheme_of(directory: str) -> str:
    """Returns `gs` for `gs://bucket/path`, and nothing for a local directory."""
    scheme, separator, _ = directory.partition("://")
    return scheme if separator else ""


def _as_json(text: str) -> str:
    return json.dumps(text)[1:-1]
