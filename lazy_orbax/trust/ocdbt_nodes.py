"""What an OCDBT database holds, found out without allocating what it says it needs.

TensorStore verifies checksums, but not how large a compressed node becomes: some kilobytes that
decode to gigabytes of table make it allocate many more. A node's length after decoding is
bounded here from the headers of its zstd blocks, before TensorStore decodes it.
"""

from __future__ import annotations

import dataclasses
import functools
import urllib.parse
from typing import Any, NamedTuple

import tensorstore as ts
from etils import epath

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust.files import brief, read_small
from lazy_orbax.trust.zarr_arrays import MOST_METADATA_BYTES

# Orbax lets a node of its trees decode to 100 MB.
_MOST_NODE_BYTES = 128 * 2**20
_MOST_TREE_BYTES = 2**30
# A node may decode to this, or to so many times its stored size. Those of Orbax reach about 70.
_SMALL_NODE_BYTES = 16 * 2**20
_MOST_EXPANSION = 512
_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_BLOCK_BYTES = 2**17
_HEADER_BYTES = 12  # The magic value and the length, before the version and the compression.
_CHECKSUM_BYTES = 4


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
    """

    metadata: dict[str, bytes]
    values: dict[str, Extent | bytes]
    longest_value: tuple[str, int]


def contents(directory: epath.Path, base: ts.KvStore, suffixes: tuple[str, ...]) -> Database | None:
    """Reads the tree of a database, and of its values only those that describe arrays.

    Args:
        directory: the item's directory.
        base: the same as a key-value store.
        suffixes: what the keys end in that describe an array.

    Returns:
        What it holds; `None` where there is no database.

    Raises:
        MalformedCheckpointError: it is malformed, or it would take much memory to decode.
    """
    manifest = read_small(directory, _paths.MANIFEST, _SMALL_NODE_BYTES)
    if manifest is None:
        return None
    return _Reader(directory, base, tuple(suffix.encode() for suffix in suffixes)).read(manifest)


class _Reader:
    def __init__(self, directory: epath.Path, base: ts.KvStore, suffixes: tuple[bytes, ...]):
        self._directory, self._base, self._suffixes = directory, base, suffixes
        self._longest, self._tree_bytes = ("", 0), 0
        self._inline: dict[bytes, bytes] = {}
        self._elsewhere: dict[bytes, str] = {}
        self._values: dict[str, Extent | bytes] = {}
        self._file_of = functools.cache(functools.partial(_file, directory))

    def read(self, manifest: bytes) -> Database:
        where = self._directory / _paths.MANIFEST
        _bound_node(manifest, where)
        versions = self._decoded(None, where).get("versions")
        if not versions:
            raise MalformedCheckpointError(where, "no version", "one version at least")
        root = versions[-1]["root"]
        pending = (
            [(root["location"], versions[-1]["root_height"], b"")] if "location" in root else []
        )
        seen = set()
        while pending:
            location, height, prefix = pending.pop()
            if location in seen:
                raise MalformedCheckpointError(where, f"node {brief(location)} twice", "a tree")
            seen.add(location)
            node = self._node(location, height)
            for entry in node["entries"]:
                key = prefix + entry["key"]
                if height:
                    inner = prefix + entry["subtree_common_prefix"]
                    pending.append((entry["location"], height - 1, inner))
                else:
                    self._take(key, entry)
        return Database(self._descriptions(), self._values, self._longest)

    def _node(self, location: str, height: int) -> dict[str, Any]:
        name, offset, length = _place(location, self._directory)
        where = self._directory / name
        self._tree_bytes += length
        if length > _MOST_NODE_BYTES or self._tree_bytes > _MOST_TREE_BYTES:
            raise MalformedCheckpointError(where, f"a node of {length} bytes", "a smaller tree")
        _bound_node(self._range(name, offset, length), where)
        node = self._decoded(location, where)
        if node["height"] != height:
            found = f"a node at height {node['height']}"
            raise MalformedCheckpointError(where, found, f"one at height {height}")
        return node

    def _decoded(self, location: str | None, where: Any) -> dict[str, Any]:
        try:
            return ts.ocdbt.dump(self._base, location).result()
        except ValueError as error:
            raise MalformedCheckpointError(
                where, f"no OCDBT node ({brief(str(error))})", "what TensorStore wrote"
            ) from error

    def _range(self, name: str, offset: int, length: int) -> bytes:
        try:
            found = self._base.read(name, byte_range=slice(offset, offset + length)).result()
        except ValueError as error:
            raise MalformedCheckpointError(
                self._directory / name,
                f"no bytes {offset} to {offset + length} ({brief(str(error))})",
                "the file as it was written",
            ) from error
        if found.state != "value":
            raise MalformedCheckpointError(self._directory / name, "no such file", "a data file")
        return bytes(found.value)

    def _take(self, key: bytes, entry: dict[str, Any]) -> None:
        if key.endswith(self._suffixes):
            if "inline_value" in entry:
                self._inline[key] = bytes(entry["inline_value"])
            else:
                self._elsewhere[key] = entry["indirect_value"]
            return
        name = key.decode(errors="backslashreplace")
        if "inline_value" in entry:
            self._values[name] = bytes(entry["inline_value"])
            return
        file, offset, length = entry["indirect_value"].rsplit(":", 2)
        self._values[name] = found = Extent(self._file_of(file), int(offset), int(length))
        if found.length > self._longest[1]:
            self._longest = (name, found.length)

    def _descriptions(self) -> dict[str, bytes]:
        found = dict(self._inline)
        for key, location in self._elsewhere.items():
            name, offset, length = _place(location, self._directory)
            if length > MOST_METADATA_BYTES:
                raise MalformedCheckpointError(
                    self._directory / name, f"{length} bytes for {brief(key)}", "a description"
                )
            found[key] = self._range(name, offset, length)
        return {key.decode(errors="backslashreplace"): value for key, value in found.items()}


def _place(location: str, directory: epath.Path) -> Extent:
    """Returns the file, the offset and the length that a location means."""
    file, offset, length = location.rsplit(":", 2)
    return Extent(_file(directory, file), int(offset), int(length))


def _file(directory: epath.Path, location: str) -> str:
    """Returns the file that a location without its offset and length means."""
    _, folder, name = location.split(":")
    path = urllib.parse.unquote(folder) + urllib.parse.unquote(name)
    if path.startswith("/") or "\0" in path or {"", ".", ".."} & set(path.split("/")):
        raise MalformedCheckpointError(
            directory / _paths.MANIFEST, f"data file {brief(path)}", "a file of this directory"
        )
    return path


def _bound_node(node: bytes, where: Any) -> None:
    """Checks that an encoded node does not become much larger when it is decoded.

    Raises:
        MalformedCheckpointError: it does, or its frame is broken.
    """
    try:
        if int.from_bytes(node[4:_HEADER_BYTES], "little") != len(node):
            raise ValueError("it is cut short, or longer than it says")
        version, compression = node[_HEADER_BYTES], node[_HEADER_BYTES + 1]
        if version != 0 or compression not in (0, 1):
            raise ValueError(f"format {version}, compression {compression}")
        body = node[_HEADER_BYTES + 2 : -_CHECKSUM_BYTES]
        length = decoded_bytes(body) if compression else len(body)
    except (ValueError, IndexError) as error:
        found = f"no OCDBT node ({error})"
        raise MalformedCheckpointError(where, found, "what TensorStore wrote") from error
    most = min(_MOST_NODE_BYTES, max(_SMALL_NODE_BYTES, _MOST_EXPANSION * len(node)))
    if length > most:
        raise MalformedCheckpointError(
            where,
            f"{len(node)} bytes that decode to {length}",
            f"at most {most}",
        )


def decoded_bytes(data: bytes) -> int:
    """Returns a bound on the decoded length of zstd frames, from their headers alone.

    Raises:
        ValueError: these are no frames.
        IndexError: they end too early.
    """
    total, position = 0, 0
    while position < len(data):
        if int.from_bytes(data[position : position + 4], "little") != _ZSTD_MAGIC:
            raise ValueError("it is no zstd frame")
        descriptor = data[position + 4]
        single_segment = bool(descriptor & 0x20)
        position += 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
        position += (int(single_segment), 2, 4, 8)[descriptor >> 6]
        last = False
        while not last:
            if position + 3 > len(data):
                raise IndexError("it ends in the middle of a zstd frame")
            header = int.from_bytes(data[position : position + 3], "little")
            last, kind, size = bool(header & 1), (header >> 1) & 3, header >> 3
            total += _ZSTD_BLOCK_BYTES if kind == 2 else size
            position += 3 + (1 if kind == 1 else size)
        position += 4 * bool(descriptor & 4)
    return total
