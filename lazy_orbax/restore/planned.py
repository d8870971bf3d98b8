"""A restore that is planned as a whole: which bytes of which files go where, then read at once.

The story: what is asked for was taken apart (`wanted.py`); leaves that are alike share a plan
(`plan/reads.py`); groups of leaves get memory (`groups.py`), are read and checked in passing
(`reader.py`, `decoder.py`) and become arrays (`arrays.py`).
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lazy_orbax.integrity.digest_file import LeafDigests
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import ChunkRead, chunk_reads
from lazy_orbax.restore import arrays
from lazy_orbax.restore.array_format import ArrayFormat
from lazy_orbax.restore.decoder import Decoder
from lazy_orbax.restore.groups import Group, grouped, targets_of
from lazy_orbax.restore.reader import Chunk, Reader, Target, arrived
from lazy_orbax.restore.source import source_of
from lazy_orbax.restore.wanted import Wanted, shards_of
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.contents import Contents
from lazy_orbax.trust.ocdbt_nodes import Extent


class MissingChunkError(Exception):
    """A chunk is not stored, or not where it should be."""


class Plan(NamedTuple):
    """What is done for every leaf of a kind.

    Attributes:
        reads: its chunks.
        keys: of each chunk, below the leaf's own.
        pieces: for each chunk, which of the saved pieces it is; -1: no digest is of it alone.
    """

    reads: tuple[ChunkRead, ...]
    keys: tuple[str, ...]
    pieces: tuple[int, ...]


class Read(NamedTuple):
    """What was read.

    Attributes:
        values: by position in the target.
        unchecked: names of the leaves whose digests were not compared in passing.
        wrong: the pieces that are not what was saved.
    """

    values: dict[int, Any]
    unchecked: frozenset[str]
    wrong: list[Piece]


def read_planned(
    wanted: Sequence[Wanted],
    contents: Contents,
    digests: Mapping[str, LeafDigests],
    *,
    limit_bytes: int,
) -> Read:
    """Reads leaves.

    Args:
        wanted: the leaves.
        contents: what the item holds.
        digests: what is known of what was saved, by name of the leaf; may be of none.
        limit_bytes: most bytes of staging, where arrays do not take host memory as it is.

    Raises:
        MissingChunkError: a chunk is not stored.
        ValueError: what is stored does not have the form that it should have.
        OSError: the storage refused.
    """
    job = _Job(contents, digests)
    with contextlib.closing(job):
        staging = arrays.Staging(limit_bytes)
        for group in grouped(wanted):
            staging.reserve(group)
            staging.add(group, *job.start(group))
        staging.finish()
    return Read(staging.values, frozenset(job.unchecked), staging.wrong)


class _Job:
    """One restore: where chunks lie, how kinds of leaves are planned."""

    def __init__(self, contents: Contents, digests: Mapping[str, LeafDigests]):
        place = place_of(contents.directory)
        self.unchecked: set[str] = set()
        self._values, self._digests = contents.values, digests
        self._reader = Reader(source_of(place))
        self._decoder = Decoder(place, in_database=contents.in_database)
        self._plans: dict[Any, Plan] = {}

    def start(self, group: Group) -> tuple[list[tuple[Target, ...]], list[Any]]:
        """Starts to read a group.

        Returns:
            The memory of each leaf, and futures of lists of pieces that are not what was saved.
        """
        targets = targets_of(group)
        plain: list[tuple[Chunk, Extent]] = []
        encoded: list[Chunk] = []
        wrong: list[Piece | None] = []
        for member, mine in zip(group.members, targets, strict=True):
            for chunk, value in self._chunks(member.wanted, mine):
                if not chunk.format.is_plain or value is None:
                    encoded.append(chunk)
                elif isinstance(value, Extent):
                    plain.append((chunk, value))
                else:
                    wrong.append(_inline(chunk, value))
        futures = self._reader.start(plain) if plain else []
        if encoded:
            wrong += self._decoder.read(encoded)
        done = collections.deque(futures)
        found = [one for one in wrong if one is not None]
        return targets, [*done, *([arrays.Done(found)] if found else [])]

    def _chunks(
        self, leaf: Wanted, targets: tuple[Target, ...]
    ) -> Iterator[tuple[Chunk, Extent | bytes | None]]:
        saved = self._digests.get(leaf.name)
        plan, values = self._plan_of(leaf, saved), self._values
        known = saved.digests if saved is not None else None
        for read, key, piece in zip(*plan, strict=True):
            value = None
            if values is not None and (value := values.get(leaf.name + key)) is None:
                raise MissingChunkError(f"leaf {leaf.name}, key {key[1:]}")
            digest = None
            if known is not None:
                if piece >= 0:
                    digest = known[piece]
                else:
                    self.unchecked.add(leaf.name)
            yield Chunk(leaf.name, leaf.form, read, targets, digest), value

    def _plan_of(self, leaf: Wanted, saved: LeafDigests | None) -> Plan:
        boxes = saved.boxes if saved is not None else ()
        kind = leaf.form, leaf.sharding, id(boxes)
        if (plan := self._plans.get(kind)) is None:
            plan = self._plans[kind] = plan_of(leaf.form, leaf.sharding, boxes)
        return plan

    def close(self) -> None:
        """Waits for the threads, and closes files."""
        self._reader.close()


def plan_of(form: ArrayFormat, sharding: Any, saved: tuple[Box, ...]) -> Plan:
    """Plans the leaves of one kind.

    Args:
        form: how they are stored.
        sharding: how they are wanted; `None` is host memory.
        saved: the pieces of which there are digests.
    """
    boxes = shards_of(sharding, form.shape).boxes
    reads = chunk_reads(form.shape, form.chunk, form.dtype.itemsize, boxes)
    places = {box: i for i, box in enumerate(saved)}
    keys = tuple(f"/{form.key(read.position)}" for read in reads)
    return Plan(reads, keys, tuple(places.get(read.box, -1) for read in reads))


def _inline(chunk: Chunk, value: bytes) -> Piece | None:
    """Takes a chunk that was in the tree of the database itself."""
    n_bytes = chunk.format.chunk_bytes
    if value[n_bytes:] != chunk.format.tail or len(value) < n_bytes:
        raise ValueError(f"leaf {chunk.leaf}: {len(value)} bytes, wanted {n_bytes} and an index")
    return arrived(chunk, memoryview(value)[:n_bytes], in_place=False)
