"""What an OCDBT database holds, found out without allocating what it says it needs.

Each node is read once, and one level of the tree at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.plan.runs import runs
from lazy_orbax.trust.files import ItemFiles, brief
from lazy_orbax.trust.ocdbt_decode import MOST_NODE_BYTES, SMALL_NODE_BYTES, decoded
from lazy_orbax.trust.zarr_arrays import MOST_METADATA_BYTES

_MOST_TREE_BYTES = 2**30
# Orbax merges a database into one node, in a file of its own.
_NODES = "d"
_MOST_LIKELY, _MOST_LIKELY_BYTES = 2, 2**22
# Nodes that are read at once.
_READ_AT_ONCE_BYTES = 2**26
_READ_AT_ONCE = 256


class Extent(NamedTuple):
    """Where a value lies: a file of the item's directory, and bytes of it."""

    file: str
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Database:
    """What the newest version of a database holds.

    Attributes:
        metadata: content of the keys that describe an array, by key.
        values: the other keys: where their values lie, or the value itself if it is a short one.
        longest_value: the key of the longest value that is not a description, and its bytes.
        nodes: the files in which the nodes of its tree lie.
    """

    metadata: dict[str, bytes]
    values: dict[str, Extent | bytes]
    longest_value: tuple[str, int]
    nodes: frozenset[str]


def contents(files: ItemFiles, suffixes: tuple[str, ...]) -> Database | None:
    """Reads the tree of a database, and of its values only those that describe arrays.

    Args:
        files: the files of the item.
        suffixes: what the keys end in that describe an array.

    Returns:
        What it holds; `None` where there is no database.

    Raises:
        MalformedCheckpointError: it is malformed, or it would take much memory to decode.
    """
    manifest = files.read(_paths.MANIFEST, SMALL_NODE_BYTES)
    if manifest is None:
        return None
    return _Reader(files, tuple(suffix.encode() for suffix in suffixes)).read(manifest)


def likely_nodes(files: ItemFiles) -> list[str]:
    """Returns the files in which the nodes of a merged database are, before its manifest is read.

    None, where they may be more than the nodes, or are not small.
    """
    names = files.names(_NODES)
    n_bytes = sum(files.size(name) or 0 for name in names)
    return names if len(names) <= _MOST_LIKELY and n_bytes <= _MOST_LIKELY_BYTES else []


class _Node(NamedTuple):
    """A node that is to be read: where it lies, and what the one above it says of it."""

    location: str
    height: int
    prefix: bytes


class _Reader:
    def __init__(self, files: ItemFiles, suffixes: tuple[bytes, ...]):
        self._files, self._suffixes = files, suffixes
        self._longest, self._tree_bytes = ("", 0), 0
        self._inline: dict[bytes, bytes] = {}
        self._elsewhere: dict[bytes, str] = {}
        self._values: dict[str, Extent | bytes] = {}
        self._file_of = functools.cache(functools.partial(_file, files))

    def read(self, manifest: bytes) -> Database:
        where = self._files.path(_paths.MANIFEST)
        versions = decoded(manifest, _paths.MANIFEST, None, where).get("versions")
        if not versions:
            raise MalformedCheckpointError(where, "no version", "one version at least")
        root = versions[-1]["root"]
        seen: set[str] = set()
        level: list[_Node] = []
        if "location" in root:
            level.append(_Node(root["location"], versions[-1]["root_height"], b""))
        while level:
            below: list[_Node] = []
            for node in level:
                if node.location in seen:
                    found = f"node {brief(node.location)} twice"
                    raise MalformedCheckpointError(where, found, "a tree")
                seen.add(node.location)
            # A level takes one round trip, if its nodes are not large.
            for some in runs(level, self._bytes_of, _READ_AT_ONCE_BYTES, _READ_AT_ONCE):
                below += self._read_nodes(some)
            level = below
        nodes = frozenset(_place(location, self._files).file for location in seen)
        return Database(self._descriptions(), self._values, self._longest, nodes)

    def _bytes_of(self, node: _Node) -> int:
        return _place(node.location, self._files).length

    def _read_nodes(self, nodes: list[_Node]) -> Iterator[_Node]:
        """Takes what is in some nodes. Yields the nodes below them."""
        reading = [self._start(node) for node in nodes]
        for node, one in zip(nodes, reading, strict=True):
            entries = self._node(node, one.result())["entries"]
            if not node.height:
                self._take(node.prefix, entries)
            for entry in entries if node.height else ():
                inner = node.prefix + entry["subtree_common_prefix"]
                yield _Node(entry["location"], node.height - 1, inner)
            entries.clear()  # TensorStore 0.1.86 never lets go of what `dump` returned.

    def _start(self, node: _Node) -> _Range:
        place = _place(node.location, self._files)
        self._tree_bytes += place.length
        if place.length > MOST_NODE_BYTES or self._tree_bytes > _MOST_TREE_BYTES:
            where = self._files.path(place.file)
            found = f"a node of {place.length} bytes"
            raise MalformedCheckpointError(where, found, "a smaller tree")
        return _Range(self._files, place)

    def _node(self, node: _Node, content: bytes) -> dict[str, Any]:
        file, _, length = node.location.rsplit(":", 2)
        name = self._file_of(file)
        where = self._files.path(name)
        found = decoded(content, name, f"{file}:0:{length}", where)
        if found["height"] != node.height:
            what = f"a node at height {found['height']}"
            raise MalformedCheckpointError(where, what, f"one at height {node.height}")
        return found

    def _take(self, prefix: bytes, entries: list[dict[str, Any]]) -> None:
        values, suffixes, file_of = self._values, self._suffixes, self._file_of
        for entry in entries:
            key, is_inline = prefix + entry["key"], "inline_value" in entry
            if key.endswith(suffixes):
                if is_inline:
                    self._inline[key] = bytes(entry["inline_value"])
                else:
                    self._elsewhere[key] = entry["indirect_value"]
                continue
            name = key.decode(errors="backslashreplace")
            if is_inline:
                values[name] = bytes(entry["inline_value"])
                continue
            file, offset, length = entry["indirect_value"].rsplit(":", 2)
            values[name] = found = Extent(file_of(file), int(offset), int(length))
            if found.length > self._longest[1]:
                self._longest = (name, found.length)

    def _descriptions(self) -> dict[str, bytes]:
        reading = {}
        for key, location in self._elsewhere.items():
            place = _place(location, self._files)
            if place.length > MOST_METADATA_BYTES:
                where = self._files.path(place.file)
                what = f"{place.length} bytes for {brief(key)}"
                raise MalformedCheckpointError(where, what, "a description")
            reading[key] = place
        found = dict(self._inline)
        for some in runs(reading.items(), _length_of, _READ_AT_ONCE_BYTES, _READ_AT_ONCE):
            started = [(key, _Range(self._files, place)) for key, place in some]
            found |= {key: one.result() for key, one in started}
        return {key.decode(errors="backslashreplace"): value for key, value in found.items()}


def _length_of(described: tuple[bytes, Extent]) -> int:
    return described[1].length


class _Range:
    """Bytes of a file that are being read: by themselves, or with all of it."""

    def __init__(self, files: ItemFiles, place: Extent):
        self._where, self._place, self._files = files.path(place.file), place, files
        self._part = slice(place.offset, place.offset + place.length)
        self._reading = None
        if not files.is_begun(place.file):
            self._reading = files.place.kvstore.read(place.file, byte_range=self._part)

    def result(self) -> bytes:
        try:
            content = self._content()
        except MalformedCheckpointError:
            raise
        except ValueError as error:
            raise self._too_short(brief(str(error))) from error
        if content is None:
            raise MalformedCheckpointError(self._where, "no such file", "a data file")
        part = content[self._part] if self._reading is None else content
        if len(part) < self._place.length:
            raise self._too_short(f"it has {len(content)}")
        return bytes(part)

    def _content(self) -> bytes | None:
        if self._reading is None:
            return self._files.read(self._place.file, _MOST_LIKELY_BYTES)
        found = self._reading.result()
        return found.value if found.state == "value" else None

    def _too_short(self, why: str) -> MalformedCheckpointError:
        found = f"no bytes {self._part.start} to {self._part.stop} ({why})"
        return MalformedCheckpointError(self._where, found, "the file as it was written")


def _place(location: str, files: ItemFiles) -> Extent:
    """Returns the file, the offset and the length that a location means."""
    file, offset, length = location.rsplit(":", 2)
    return Extent(_file(files, file), int(offset), int(length))


def _file(files: ItemFiles, location: str) -> str:
    """Returns the file that a location without its offset and length means."""
    _, folder, name = location.split(":")
    path = urllib.parse.unquote(folder) + urllib.parse.unquote(name)
    if path.startswith("/") or "\0" in path or {"", ".", ".."} & set(path.split("/")):
        where = files.path(_paths.MANIFEST)
        raise MalformedCheckpointError(
            where, f"data file {brief(path)}", "a file of this directory"
        )
    return path
