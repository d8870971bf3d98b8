"""What an item holds, found once: for whoever would else read the same files again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import tensorstore as ts
from etils import epath

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust import ocdbt_nodes, zarr_arrays
from lazy_orbax.trust.declared_sizes import Arrays
from lazy_orbax.trust.files import Files, brief, read_small
from lazy_orbax.trust.ocdbt_nodes import Extent
from lazy_orbax.trust.tree_file import Tree

ZARR_NAMES = frozenset({_paths.ZARR_V2, _paths.ZARR_V3})


@dataclasses.dataclass(frozen=True)
class Contents:
    """What was found in an item.

    Attributes:
        directory: the item's directory.
        tree: what `_METADATA` says; `None` where there is none.
        keys: kinds of the leaves that are typed PRNG keys, by name.
        in_database: whether the arrays are in an OCDBT database, and not in a directory each.
        descriptions: the metadata of each array, by its path such as `name/.zarray`.
        values: where each chunk lies, or the chunk itself if it is a short one, by its path; `None`
            where nobody listed them.
        longest_value: the longest stored chunk and its bytes.
    """

    directory: str
    tree: Tree | None
    keys: Mapping[str, str]
    in_database: bool
    descriptions: Mapping[str, bytes]
    values: Mapping[str, Extent | bytes] | None
    longest_value: tuple[str, int]

    def declared(self) -> Arrays:
        """Returns what the arrays declare.

        Raises:
            MalformedCheckpointError: one is not what a Zarr array of numbers is described by.
        """

        def where(path: str) -> str:
            if self.in_database:
                return f"{self.directory}/{_paths.MANIFEST}, key {brief(path)}"
            return f"{self.directory}/{path}"

        stored = None if self.values is None else len(self.values) + len(self.descriptions)
        found = zarr_arrays.declared_by_all(self.descriptions.items(), where)
        return Arrays(found, stored, self.longest_value)


def contents_of(
    directory: epath.Path,
    base: ts.KvStore,
    files: Files | None,
    tree: Tree | None,
    keys: Mapping[str, str],
) -> Contents:
    """Finds out where the arrays of an item are.

    Args:
        directory: the item's directory.
        base: the same as a key-value store.
        files: what lies in it, where that could be listed.
        tree: what `_METADATA` says, if there is one.
        keys: kinds of the leaves that are typed PRNG keys, by name.

    Raises:
        MalformedCheckpointError: it is not what Orbax wrote.
    """
    # Orbax goes by `_METADATA`, and by the manifest where that does not say.
    if tree is None or tree.use_ocdbt is not False:
        suffixes = tuple(f"/{name}" for name in ZARR_NAMES)
        found = ocdbt_nodes.contents(directory, base, suffixes)
        if found is not None:
            metadata, values, longest = found.metadata, found.values, found.longest_value
            return Contents(str(directory), tree, keys, True, metadata, values, longest)
    if tree is not None:
        _refuse_paths(directory, tree)
    if files is None:
        names = [f"{leaf}/{name}" for leaf in (tree.leaves if tree else ()) for name in ZARR_NAMES]
        metadata = dict(_read_at_once(base, names))
        return Contents(str(directory), tree, keys, False, metadata, None, ("", 0))
    metadata = dict(_read_one_by_one(directory, files.names))
    values = {
        name: Extent(name, 0, size)
        for name, size in files.sizes.items()
        if "/" in name and name not in files.names
    }
    return Contents(str(directory), tree, keys, False, metadata, values, files.longest_chunk)


def _read_one_by_one(directory: epath.Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        content = read_small(directory, name, zarr_arrays.MOST_METADATA_BYTES)
        if content is not None:
            yield name, content


def _read_at_once(base: ts.KvStore, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    reads = [(name, base.read(name)) for name in names]
    for name, read in reads:
        if (result := read.result()).state == "value":
            yield name, bytes(result.value)


def _refuse_paths(directory: epath.Path, tree: Tree) -> None:
    """In plain Zarr a name is a path."""
    problems = [
        f"leaf {brief(name)}: found a path out of the directory, wanted one within"
        for name in tree.leaves
        if name.startswith("/") or "\0" in name or ".." in name.split("/")
    ]
    if problems:
        raise MalformedCheckpointError.of(directory / _paths.TREE, problems)
