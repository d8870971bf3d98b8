"""The nodes of an OCDBT database, decoded without allocating what they say they need.

TensorStore verifies checksums, but not how large a compressed node becomes: some kilobytes that
decode to gigabytes of table make it allocate many more. A node's length after decoding is
bounded here from the headers of its zstd blocks, before TensorStore decodes it, from memory.
"""

from __future__ import annotations

from typing import Any

import tensorstore as ts

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust.files import brief

# Orbax lets a node of its trees decode to 100 MB.
MOST_NODE_BYTES = 128 * 2**20
# A node may decode to this, or to so many times its stored size. Those of Orbax reach about 70.
SMALL_NODE_BYTES = 16 * 2**20
_MOST_EXPANSION = 512
_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_BLOCK_BYTES = 2**17
_HEADER_BYTES = 12  # The magic value and the length, before the version and the compression.
_CHECKSUM_BYTES = 4


def decoded(content: bytes, name: str, location: str | None, where: str) -> dict[str, Any]:
    """Returns what TensorStore says of a node, or of the manifest.

    Args:
        content: of the node alone.
        name: of the file that it is from.
        location: of the node in a file of this name that has nothing else; `None` for the manifest.
        where: the file, for errors.

    Raises:
        MalformedCheckpointError: it is none, or it would take much memory to decode.
    """
    _bound(content, where)
    alone = ts.KvStore.open("memory://", context=ts.Context()).result()
    alone.write(name, content).result()
    try:
        return ts.ocdbt.dump(alone, location).result()
    except ValueError as error:
        raise MalformedCheckpointError(
            where, f"no OCDBT node ({brief(str(error))})", "what TensorStore wrote"
        ) from error


def _bound(node: bytes, where: Any) -> None:
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
    most = min(MOST_NODE_BYTES, max(SMALL_NODE_BYTES, _MOST_EXPANSION * len(node)))
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
