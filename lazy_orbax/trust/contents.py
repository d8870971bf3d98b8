"""What an item holds, found once: for whoever would else read the same files again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust import ocdbt_nodes, zarr_arrays
from lazy_orbax.trust.declared_sizes import Arrays
from lazy_orbax.trust.files import ItemFiles, brief
from lazy_orbax.trust.ocdbt_nodes import Extent
from lazy_orbax.trust.tree_file import Tree

ZARR_NAMES = frozenset({_paths.ZARR_V2, _paths.ZARR_V3})


@dataclasses.dataclass(frozen=True)
class Contents:
    """What was found in an item.

    Attributes:
        files: the item's files, and what is in the small ones.
        tree: what `_METADATA` says; `None` where there is none.
        keys: kinds of the leaves that are typed PRNG keys, by name.
        in_database: whether the arrays are in an OCDBT database, and not in a directory each.
        descriptions: the metadata of each array, by its path such as `name/.zarray`.
        values: where each chunk lies, or the chunk itself if it is a short one, by its path; `None`
            where nobody listed them.
        longest_value: the longest stored chunk and its bytes.
    """

    files: ItemFiles
    tree: Tree | None
    keys: Mapping[str, str]
    in_database: bool
    descriptions: Mapping[str, bytes]
    values: Mapping[str, Extent | bytes] | None
    longest_value: tuple[str, int]

    @property
    def directory(self) -> str:
        """The item's directory, or its address."""
        return self.files.place.directory

    def declared(self) -> Arrays:
        """Returns what the arrays declare.

        Raises:
            MalformedCheckpointError: one is not what a Zarr array of numbers is described by.
        """

        def where(path: str) -> str:
            if self.in_database:
                return f"{self.files.path(_paths.MANIFEST)}, key {brief(path)}"
            return self.files.path(path)

        stored = None if self.values is None else len(self.values) + len(self.descriptions)
        found = zarr_arrays.declared_by_all(self.descriptions.items(), where)
        return Arrays(found, stored, self.longest_value)


def contents_of(files: ItemFiles, tree: Tree | None, keys: Mapping[str, str]) -> Contents:
    """Finds out where the arrays of an item are.

    Args:
        files: the item's files.
        tree: what `_METADATA` says, if there is one.
        keys: kinds of the leaves that are typed PRNG keys, by name.

    Raises:
        MalformedCheckpointError: it is not what Orbax wrote.
    """
    # Orbax goes by `_METADATA`, and by the manifest where that does not say.
    if tree is None or tree.use_ocdbt is not False:
        suffixes = tuple(f"/{name}" for name in ZARR_NAMES)
        found = ocdbt_nodes.contents(files, suffixes)
        if found is not None:
            metadata, values, longest = found.metadata, found.values, found.longest_value
            return Contents(files, tree, keys, True, metadata, values, longest)
    if tree is not None:
        _refuse_paths(files, tree)
    if files.sizes is None:
        names = [f"{leaf}/{name}" for leaf in (tree.leaves if tree else ()) for name in ZARR_NAMES]
        return Contents(files, tree, keys, False, _read_at_once(files, names), None, ("", 0))
    names = describing_arrays(files)
    files.read_ahead(names, zarr_arrays.MOST_METADATA_BYTES)
    metadata = {}
    for name in names:
        content = files.read(name, zarr_arrays.MOST_METADATA_BYTES)
        if content is not None:
            metadata[name] = content
    known = set(names)
    values = {
        name: Extent(name, 0, size)
        for name, size in files.sizes.items()
        if "/" in name and name not in known
    }
    longest = max(values.values(), key=lambda one: one.length, default=Extent("", 0, 0))
    return Contents(files, tree, keys, False, metadata, values, (longest.file, longest.length))


def describing_arrays(files: ItemFiles) -> list[str]:
    """Returns the paths of the files that each describe an array of plain Zarr."""
    return [name for name in files.sizes or () if name.rpartition("/")[2] in ZARR_NAMES]


def _read_at_once(files: ItemFiles, names: Iterable[str]) -> dict[str, bytes]:
    reads = [(name, files.place.kvstore.read(name)) for name in names]
    found = [(name, read.result()) for name, read in reads]
    return {name: bytes(read.value) for name, read in found if read.state == "value"}


def _refuse_paths(files: ItemFiles, tree: Tree) -> None:
    """In plain Zarr a name is a path."""
    problems = [
        f"leaf {brief(name)}: found a path out of the directory, wanted one within"
        for name in tree.leaves
        if name.startswith("/") or "\0" in name or ".." in name.split("/")
    ]
    if problems:
        raise MalformedCheckpointError.of(files.path(_paths.TREE), problems)
