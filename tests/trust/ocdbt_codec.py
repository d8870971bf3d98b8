"""OCDBT's containers, taken apart and put together again with a right checksum.

A random change to a manifest or a node is found by its checksum. What is behind that is reached
only by changing the content and adding the checksum that goes with it.
"""

from __future__ import annotations

import pathlib
import struct

import google_crc32c
import numcodecs
import tensorstore as ts

MANIFEST_MAGIC = bytes.fromhex("0cdb3a2a")
NODE_MAGIC = bytes.fromhex("0cdb20de")
_HEADER_BYTES, _CHECKSUM_BYTES = 14, 4


def content(container: bytes) -> bytes:
    """Returns what is in a manifest or a node, decoded."""
    body = container[_HEADER_BYTES:-_CHECKSUM_BYTES]
    return bytes(numcodecs.Zstd().decode(body)) if container[_HEADER_BYTES - 1] else body


def compressed(data: bytes) -> bytes:
    return bytes(numcodecs.Zstd(3).encode(data))


def container(magic: bytes, body: bytes, *, is_compressed: bool) -> bytes:
    """Returns a manifest or a node with this body, and a right length and checksum."""
    length = _HEADER_BYTES + len(body) + _CHECKSUM_BYTES
    head = magic + struct.pack("<Q", length) + bytes([0, is_compressed])
    checksum = google_crc32c.value(head + body)
    return head + body + struct.pack("<I", checksum)


def varint(value: int) -> bytes:
    encoded = b""
    while value >= 128:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def config_bytes(manifest: bytes) -> int:
    """Returns the length of the configuration in a manifest's content; a table of files follows."""
    position = 16  # The identity of the database.
    for _ in range(3):  # The kind of manifest, the longest inline value, the longest node.
        while manifest[position] & 128:
            position += 1
        position += 1
    position += 1  # The arity.
    return position + (5 if manifest[position] else 1)  # The compression, and its level.


def table(*names: bytes) -> bytes:
    """Returns a table of data files: no prefixes, no base paths."""
    return (
        varint(len(names))
        + bytes(len(names) - 1)
        + b"".join(varint(len(name)) for name in names)
        + bytes(len(names))
        + b"".join(names)
    )


def root_of(directory: pathlib.Path) -> tuple[pathlib.Path, int, int, int]:
    """Returns the file, offset, length and height of a database's root."""
    base = ts.KvStore.open(f"file://{directory}/").result()
    newest = ts.ocdbt.dump(base).result()["versions"][-1]
    _, folder, name, offset, length = newest["root"]["location"].split(":")
    return directory / (folder + name), int(offset), int(length), newest["root_height"]


def root_content(directory: pathlib.Path) -> bytes:
    file, offset, length, _ = root_of(directory)
    return content(file.read_bytes()[offset : offset + length])


def put_root(directory: pathlib.Path, node: bytes, *, name: bytes = b"d/" + b"0" * 32) -> None:
    """Gives a database another root node, in a data file of its own."""
    height = root_of(directory)[3]
    manifest = directory / "manifest.ocdbt"
    (directory / "d").mkdir(exist_ok=True)
    (directory / name.decode()).write_bytes(node)
    old = content(manifest.read_bytes())
    config = old[: config_bytes(old)]
    version = varint(1) + varint(1) + bytes([height, 0, 0]) + varint(len(node))
    statistics = varint(10) + varint(len(node)) + varint(10)
    body = config + table(name) + version + statistics + struct.pack("<Q", 1) + b"\0"
    manifest.write_bytes(container(MANIFEST_MAGIC, compressed(body), is_compressed=True))
