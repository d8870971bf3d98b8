"""The arrays of a saved item: how they are opened, and which files hold them."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.integrity.chunk_location import chunk_keys, file_of
from lazy_orbax.plan.boxes import Box
from lazy_orbax.storage.place import Place


@dataclasses.dataclass(frozen=True)
class StoredArrays:
    """The arrays of an item. Nothing is opened before it is asked for.

    Attributes:
        place: the item's directory.
        base: the same, open as a plain key-value store.
        context: TensorStore's, with what is cached of them.
        driver: TensorStore's name of the format of each array.
        use_ocdbt: whether the arrays are in a database, and not in a directory each.
    """

    place: Place
    base: ts.KvStore
    context: ts.Context
    driver: str
    use_ocdbt: bool

    def open(self, name: str) -> Any:
        """Returns a future of TensorStore's array of a leaf."""
        prefix = name if name.endswith("/") or not name else f"{name}/"
        try:
            return ts.open(
                {"driver": self.driver},
                kvstore=self._kvstore + prefix,
                context=self.context,
                open=True,
                read=True,
            )
        except (ValueError, OSError) as error:
            return _Failed(error)

    @functools.cached_property
    def _kvstore(self) -> ts.KvStore:
        if not self.use_ocdbt:
            return self.base
        spec = {"driver": "ocdbt", "base": self.place.kvstore_spec()}
        return ts.KvStore.open(spec, context=self.context).result()

    def file_of(self, name: str, box: Box) -> str | None:
        """Returns the file that holds a box of a leaf, or the first of them.

        `None` where none is found.
        """
        try:
            store = self.open(name).result()
            (key, *_) = chunk_keys(store, box)
            if not self.use_ocdbt:
                return f"{name}/{key}"
            return file_of(self.base, store.kvstore.path + key, self.context)
        except (ValueError, OSError, KeyError, IndexError):
            return None

    def metadata_file(self, name: str) -> str | None:
        """Returns the file that holds the metadata of a leaf's array; `None` as in `file_of`."""
        metadata = _paths.ZARR_V2 if self.driver == "zarr" else _paths.ZARR_V3
        key = f"{name}/{metadata}".lstrip("/")
        if not self.use_ocdbt:
            return key
        try:
            return file_of(self.base, key, self.context)
        except (ValueError, OSError, KeyError):
            return None

    def file_in(self, text: str) -> str | None:
        """Returns the last file that an error of TensorStore names, relative to the item."""
        here = (self.place.path or self.place.directory).strip("/")
        found = [
            name.partition(here)[2].strip("/")
            for name in re.findall(r"[\"']([^\"']*/[^\"']*)[\"']", text)
            if here in name
        ]
        return next((name for name in reversed(found) if name), None)


class _Failed(NamedTuple):
    """A future that has failed."""

    error: Exception

    def result(self) -> Any:
        raise self.error
