"""The file of digests that each process writes beside the tree. Stock Orbax ignores it.

It holds a digest of every piece that the process wrote, as it lay in host memory, and of the small
files that it wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lazy_orbax import _paths
from lazy_orbax.integrity.digest import digest_of_bytes, digest_of_text
from lazy_orbax.plan.boxes import Box, Shape

if TYPE_CHECKING:
    from lazy_orbax.plan.slabs import Piece, Plan

DIRECTORY = _paths.DIGESTS
_FORMAT = 1
_HEAD = b'{"digest":"%016x",'
_HEAD_BYTES = len(_HEAD % 0)


class DigestError(ValueError):
    """A file of digests is not what was written."""


@dataclasses.dataclass(frozen=True, eq=False)
class DigestTemplate:
    """What is the same in the digests of every save of a plan.

    Attributes:
        plan: the plan.
        dtypes: dtype on disk of each of its leaves.
        use_ocdbt: whether the leaves are in OCDBT.
        driver: TensorStore's driver, `zarr` or `zarr3`.
        process: this process.
        processes: every process that writes such a file for the item.
        others: names of leaves that have no digest: their own type handlers write them.
        folder: where the file goes, in the item's directory.
    """

    plan: Plan
    dtypes: tuple[str, ...]
    use_ocdbt: bool
    driver: str
    process: int
    processes: tuple[int, ...]
    others: tuple[str, ...]
    folder: str = DIRECTORY

    @functools.cached_property
    def casts(self) -> tuple[str | None, ...]:
        """The dtype on disk of each leaf that is cast on the way there, else `None`."""
        pairs = zip(self.plan.leaves, self.dtypes, strict=True)
        return tuple(None if leaf.dtype.name == dtype else dtype for leaf, dtype in pairs)

    @functools.cached_property
    def _pieces(self) -> tuple[Piece, ...]:
        """What this process writes, leaf by leaf."""
        pieces = [piece for slab in self.plan.slabs for piece in slab.pieces]
        return tuple(sorted(pieces, key=lambda piece: piece.leaf))

    @functools.cached_property
    def _fixed(self) -> bytes:
        leaves: dict[int, list[Any]] = {}
        for piece in self._pieces:
            leaf = self.plan.leaves[piece.leaf]
            entry = [leaf.name, self.dtypes[piece.leaf], leaf.shape, []]
            leaves.setdefault(piece.leaf, entry)[3].append([piece.start, piece.shape])
        fixed = {
            "format": _FORMAT,
            "hash": "xxh3_64",
            "process": self.process,
            "processes": self.processes,
            "use_ocdbt": self.use_ocdbt,
            "driver": self.driver,
            "others": self.others,
            "leaves": list(leaves.values()),
        }
        return json.dumps(fixed, separators=(",", ":")).encode()

    @functools.cached_property
    def _fixed_digest(self) -> int:
        return digest_of_bytes(self._fixed)

    def fill(
        self,
        digests: Mapping[int, int],
        files: Mapping[str, bytes],
        texts: Mapping[str, str],
        directory: str,
        fingerprints: Mapping[int, int] | None = None,
    ) -> tuple[str, bytes, str]:
        """Returns name and content of the file, and the fingerprint of all that was written.

        Args:
            digests: digest of each piece, by the `id` of the piece in the plan.
            files: the small files that this process writes, by name.
            texts: the leaves that are strings, by name.
            directory: the item's directory.
            fingerprints: of each piece in the same way, where the snapshot was verified.
        """
        found = np.fromiter((digests[id(p)] for p in self._pieces), ">u8", len(self._pieces))
        strings = {name: f"{digest_of_text(text):016x}" for name, text in texts.items()}
        so_far = digest_of_bytes(found, seed=self._fixed_digest)
        fingerprint = f"{digest_of_bytes(json.dumps(strings).encode(), seed=so_far):016x}"
        changing = {
            "step": _paths.step_of_item(directory),
            "place": _paths.names_of(directory),
            "fingerprint": fingerprint,
            "files": {
                name: [len(content), f"{digest_of_bytes(content):016x}"]
                for name, content in files.items()
            },
            "strings": strings,
            "pieces": found.tobytes().hex(),
        }
        if fingerprints is not None:  # Older readers do not look for it.
            proof = np.fromiter((fingerprints[id(p)] for p in self._pieces), ">u8", found.size)
            changing["proof"] = proof.tobytes().hex()
        tail = json.dumps(changing, separators=(",", ":")).encode()
        content = seal(b"".join((self._fixed[1:-1], b",", tail[1:])))
        return f"{self.folder}/process_{self.process}", content, fingerprint


@dataclasses.dataclass(frozen=True)
class LeafDigests:
    """The digests of what one process wrote of one leaf.

    Attributes:
        name: as Orbax names the leaf.
        dtype: dtype on disk.
        shape: global shape.
        boxes: the pieces.
        digests: one for each of them.
        fingerprints: one for each of them, or none at all. See `fingerprint.py`.
    """

    name: str
    dtype: str
    shape: Shape
    boxes: tuple[Box, ...]
    digests: tuple[int, ...]
    fingerprints: tuple[int, ...] = ()

    @functools.cached_property
    def _by_start(self) -> dict[Shape, int]:
        return {box.start: i for i, box in enumerate(self.boxes)}

    @functools.cached_property
    def _corners(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.array([box.start for box in self.boxes]).reshape(len(self.boxes), -1)
        return starts, starts + np.array([box.shape for box in self.boxes]).reshape(starts.shape)

    def touching(self, box: Box) -> list[tuple[Box, int]]:
        """Returns the pieces, and their digests, that have something of a box in them."""
        same = self._by_start.get(box.start)
        if same is not None and self.boxes[same] == box:
            found: list[int] = [same]
        elif len(box.start) != len(self.shape):
            found = []
        else:
            starts, ends = self._corners
            after = np.array(box.start) + np.array(box.shape, int)
            overlaps = (np.maximum(starts, box.start) < np.minimum(ends, after)).all(axis=1)
            found = np.flatnonzero(overlaps).tolist()
        return [(self.boxes[i], self.digests[i]) for i in found]

    def joined(self, other: LeafDigests) -> LeafDigests:
        """Returns the digests of what two processes wrote of this leaf."""
        boxes, digests = self.boxes + other.boxes, self.digests + other.digests
        both = self.fingerprints and other.fingerprints
        proof = self.fingerprints + other.fingerprints if both else ()
        return dataclasses.replace(self, boxes=boxes, digests=digests, fingerprints=proof)


@dataclasses.dataclass(frozen=True)
class ProcessDigests:
    """A file of digests as it was read. The attributes are those of `DigestTemplate.fill`.

    `place` is `_paths.names_of` the item's directory; an older lazy_orbax did not note it.
    """

    process: int
    processes: tuple[int, ...]
    use_ocdbt: bool
    driver: str
    others: tuple[str, ...]
    step: int | None
    place: tuple[str, ...]
    fingerprint: str
    files: dict[str, tuple[int, int]]
    strings: dict[str, int]
    leaves: tuple[LeafDigests, ...]


def seal(fields: bytes) -> bytes:
    """Returns the content of a file: a JSON object with a digest of itself.

    Args:
        fields: the object, without its first brace.
    """
    return _HEAD % digest_of_bytes(fields) + fields


def unseal(content: bytes) -> Any:
    """Returns what `seal` was given, read as JSON.

    Raises:
        DigestError: it is not what was written.
    """
    body = memoryview(content)[_HEAD_BYTES:]
    if content[:_HEAD_BYTES] != _HEAD % digest_of_bytes(body):
        raise DigestError(f"its own digest does not fit its {len(content)} bytes")
    return json.loads(content)


def parse(content: bytes) -> ProcessDigests:
    """Reads a file of digests.

    Raises:
        DigestError: it is not what was written.
    """
    try:
        found = unseal(content)
        if found["format"] != _FORMAT or found["hash"] != "xxh3_64":
            raise DigestError(f"it has form {found['format']!r}, which a later lazy_orbax can read")
        return _parsed(found)
    except DigestError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DigestError(f"it does not have the fields it should have: {error!r}") from error
    except ValueError as error:
        raise DigestError(str(error)) from error


def _parsed(found: dict[str, Any]) -> ProcessDigests:
    if found["driver"] not in ("zarr", "zarr3"):
        raise DigestError(f"it names a driver {found['driver']!r}")
    digests = np.frombuffer(bytes.fromhex(found["pieces"]), ">u8").tolist()
    proof = np.frombuffer(bytes.fromhex(found.get("proof", "")), ">u8").tolist()
    if proof and len(proof) != len(digests):
        raise DigestError(f"it has {len(proof)} fingerprints for {len(digests)} pieces")
    leaves, done = [], 0
    alike: dict[str, tuple[Box, ...]] = {}  # Most leaves of a model are divided like others,
    last, boxes = None, ()  # and many like the one before, which is sooner seen.
    for name, dtype, shape, pieces in found["leaves"]:
        if (shape, pieces) != last:
            last = shape, pieces
            kind = f"{shape!r} {pieces!r}"  # A text is no list that looks like it.
            if (boxes := alike.get(kind)) is None:
                boxes = alike[kind] = tuple(_box(start, extent, shape) for start, extent in pieces)
        part = slice(done, done + len(boxes))
        mine = tuple(digests[part]), tuple(proof[part])
        done += len(boxes)
        leaves.append(LeafDigests(str(name), str(dtype), tuple(shape), boxes, *mine))
    if done != len(digests):
        raise DigestError(f"it has {len(digests)} digests for {done} pieces")
    return ProcessDigests(
        process=int(found["process"]),
        processes=tuple(map(int, found["processes"])),
        use_ocdbt=bool(found["use_ocdbt"]),
        driver=found["driver"],
        others=tuple(map(str, found["others"])),
        step=None if found["step"] is None else int(found["step"]),
        place=tuple(map(str, found.get("place", ()))),
        fingerprint=str(found["fingerprint"]),
        files={
            str(name): (int(size), int(digest, 16))
            for name, (size, digest) in found["files"].items()
        },
        strings={str(name): int(digest, 16) for name, digest in found["strings"].items()},
        leaves=tuple(leaves),
    )


def _box(start: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> Box:
    fits = all(
        isinstance(n, int) and 0 <= a < a + n <= whole
        for a, n, whole in zip(start, extent, shape, strict=True)
    )
    if not fits:
        raise DigestError(f"it has a piece at {start} of shape {extent} in a leaf of {shape}")
    return Box(tuple(start), tuple(extent))
