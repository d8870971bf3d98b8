"""Values of an OCDBT database that are what they are in the step before: referred to again.

A database keeps values in files that nobody changes, and refers to them by name. So the files of
the step before are linked into the directory of this one, and TensorStore copies the references:
it reads the old manifest over the linked files. All of that is the storage's own format, and the
step is whole without the other one. What is dead in a linked file stays on disk for as long as the
file has references, so files that are mostly dead are left, and what lives in them is written.
"""

from __future__ import annotations

import collections
import os

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.save.linked_files import LinkedFiles, OpenEarlier
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.files import ItemFiles
from lazy_orbax.trust.ocdbt_nodes import Database, Extent, contents

# Of a file's bytes, so many must be alive in the step before.
_LEAST_LIVE = 0.5


class LinkedValues:
    """Links values of the database that one process writes."""

    def __init__(self, files: LinkedFiles, process: str):
        """Links what the references are in, and no values yet.

        Args:
            files: links files of the item.
            process: name of the process's directory.

        Raises:
            OSError: that cannot be.
            MalformedCheckpointError: there is no such database in the step before.
        """
        self._files, self._process = files, process
        self._described = _database(files.earlier).metadata
        database = _database(f"{files.earlier}/{process}")
        with open(f"{files.earlier}/{process}/{_paths.MANIFEST}", "rb") as file:
            self._manifest = file.read()  # The step may be deleted meanwhile.
        self._values = database.values
        live, end_of = collections.Counter[str](), collections.Counter[str]()
        for value in self._values.values():
            if isinstance(value, Extent):
                live[value.file] += value.length
                end_of[value.file] = max(end_of[value.file], value.offset + value.length)
        size_of = {file: os.stat(f"{files.earlier}/{process}/{file}").st_size for file in live}
        # One that was cut off is left too: a power cut does that to copies that nobody synced.
        whole = (file for file, end in end_of.items() if end <= size_of[file])
        self._worth = {file for file in whole if live[file] >= _LEAST_LIVE * size_of[file]}
        self._linked: set[str] = set()
        self._keys: list[str] = []
        try:
            if not all(self._link_file(file) for file in database.nodes):
                raise OSError(f"{files.earlier}/{process} cannot be linked")
        except OSError:
            self._unlink(set(self._linked))
            raise

    def metadata(self, key: str) -> bytes | None:
        """Returns what describes an array in the step before."""
        return self._described.get(key)

    def link(self, key: str) -> bool:
        """Links the file of a value, and notes the value. Returns whether that was done.

        Raises:
            OSError: the file cannot be linked.
        """
        value = self._values.get(key)
        if not isinstance(value, Extent) or value.file not in self._worth:
            return False
        if not self._link_file(value.file):
            self._worth.discard(value.file)
            return False
        self._keys.append(key)
        return True

    def _link_file(self, file: str) -> bool:
        if file not in self._linked:
            if not self._files.link(f"{self._process}/{file}"):
                return False
            self._linked.add(file)
        return True

    def finish(self, open_earlier: OpenEarlier) -> None:
        """Refers to the values, and removes the links to what nothing refers to.

        Args:
            open_earlier: is `ItemStores.open_earlier`.

        Raises:
            ValueError: the storage refused, or does not have the values.
            OSError: the storage refused.
        """
        if self._keys:
            self._refer(*open_earlier(self._manifest))
        # None where this process wrote nothing.
        database = _contents(f"{self._files.directory}/{self._process}")
        values = database.values if database is not None else {}
        for key in self._keys:
            if values.get(key) != self._values[key]:
                raise ValueError(f"{key}: found {values.get(key)}, linked was {self._values[key]}")
        used = {value.file for value in values.values() if isinstance(value, Extent)}
        self._unlink(self._linked - used - (database.nodes if database is not None else set()))

    def _unlink(self, files: set[str]) -> None:
        for file in files:
            os.unlink(f"{self._files.directory}/{self._process}/{file}")

    def _refer(self, earlier: ts.KvStore, store: ts.KvStore) -> None:
        transaction = ts.Transaction(atomic=True)
        into = store.with_transaction(transaction)
        ranges = (ts.KvStore.KeyRange(key, f"{key}\0") for key in self._keys)
        copies = [earlier.experimental_copy_range_to(into, source_range=one) for one in ranges]
        for copy in copies:
            copy.result()
        transaction.commit_async().result()


def _contents(directory: str) -> Database | None:
    return contents(ItemFiles(place_of(directory)), (_paths.ZARR_V2, _paths.ZARR_V3))


def _database(directory: str) -> Database:
    if (found := _contents(directory)) is None:
        raise FileNotFoundError(f"{directory}/{_paths.MANIFEST}")
    return found
