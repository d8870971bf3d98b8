"""A restore that is planned as a whole: which bytes of which files go where, then read at once.

The story: what is asked for was taken apart (`wanted.py`); leaves that are alike share a plan
(`plan/reads.py`); groups of leaves get memory (`groups.py`), are read and checked in passing
(`reader.py`, `decoder.py`) and become arrays (`arrays.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.integrity.digest_file import LeafDigests
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import ChunkRead, chunk_reads
from lazy_orbax.restore import arrays
from lazy_orbax.restore.chunk import Chunk, Target, arrived
from lazy_orbax.restore.decoder import Decoder, decode
from lazy_orbax.restore.groups import Group, grouped, in_order, targets_of
from lazy_orbax.restore.memory import Slabs
from lazy_orbax.restore.reader import Reader
from lazy_orbax.restore.source import source_of
from lazy_orbax.restore.wanted import Wanted
from lazy_orbax.storage.places import Done, place_of
from lazy_orbax.timeline import RestoreRecorder
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
        kind: what it was made of.
    """

    reads: tuple[ChunkRead, ...]
    keys: tuple[str, ...]
    pieces: tuple[int, ...]
    kind: Any


class Request(NamedTuple):
    """What is wanted of a stored leaf.

    Attributes:
        leaf: its name.
        form: how it is stored.
        boxes: what is wanted of it.
        targets: where each of them goes.
    """

    leaf: str
    form: ArrayFormat
    boxes: tuple[Box, ...]
    targets: tuple[Target, ...]


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
    recorder: RestoreRecorder,
) -> Read:
    """Reads leaves.

    Args:
        wanted: the leaves.
        contents: what the item holds.
        digests: what is known of what was saved, by name of the leaf; may be of none.
        limit_bytes: most bytes of staging, where arrays do not take host memory as it is.
        recorder: is told what was read when.

    Raises:
        MissingChunkError: a chunk is not stored.
        ValueError: what is stored does not have the form that it should have.
        OSError: the storage refused.
    """
    job = Job(contents, digests)

    def start(group: Group, targets: Sequence[tuple[Target, ...]]) -> list[Any]:
        return job.start(_requests(group, targets))

    with contextlib.closing(job):
        leaves = in_order(wanted, contents.values or {})
        groups = list(grouped(((leaf,) for leaf in leaves), limit_bytes))
        staging = read_groups(groups, start, limit_bytes=limit_bytes, recorder=recorder)
    recorder.note(bytes_read=job.n_bytes, requests=job.requests)
    return Read(staging.values, frozenset(job.unchecked), staging.wrong)


def read_groups(
    groups: Sequence[Group],
    start: Callable[[Group, Sequence[tuple[Target, ...]]], list[Any]],
    *,
    limit_bytes: int,
    recorder: RestoreRecorder,
) -> arrays.Staging:
    """Reads groups of leaves, and makes arrays of those that have come while others are read.

    Args:
        groups: the groups.
        start: starts to read a group into its memory, and returns futures.
        limit_bytes: most bytes of staging.
        recorder: is told what was read when.
    """
    wanted_bytes = sum(group.stored_bytes for group in groups)
    n_leaves = sum(len(group.members) for group in groups)
    recorder.note(n_leaves=n_leaves, bytes_wanted=wanted_bytes)
    staging = arrays.Staging(limit_bytes, recorder.arrived)
    recorder.mark("planned")
    slabs = Slabs()
    for group in groups:
        staging.reserve(group)
        targets = targets_of(group, slabs.new)
        staging.add(group, targets, start(group, targets))
    staging.finish()
    recorder.mark("first_byte", "read")
    return staging


def _requests(group: Group, targets: Sequence[tuple[Target, ...]]) -> Iterator[Request]:
    for member, mine in zip(group.members, targets, strict=True):
        form = member.wanted.form
        assert form is not None
        yield Request(member.wanted.name, form, member.boxes, mine)


class Job:
    """One restore: where chunks lie, how kinds of leaves are planned."""

    def __init__(self, contents: Contents, digests: Mapping[str, LeafDigests]):
        place = place_of(contents.directory)
        self.unchecked: set[str] = set()
        self._values, self._digests = contents.values, digests
        self._source = source_of(place)
        self._reader = Reader(self._source)
        self._decoder = Decoder(place, in_database=contents.in_database)
        self._plans: dict[Any, Plan] = {}

    def start(self, requests: Iterable[Request]) -> list[Any]:
        """Starts to read what is wanted of some stored leaves.

        Returns:
            Futures of lists of pieces that are not what was saved.
        """
        plain: list[tuple[Chunk, Extent]] = []
        encoded: list[tuple[Chunk, Extent]] = []
        short: list[tuple[Chunk, bytes]] = []
        somewhere: list[Chunk] = []
        wrong: list[Piece | None] = []
        for request in requests:
            for chunk, value in self._chunks(request):
                if value is None:
                    somewhere.append(chunk)
                elif isinstance(value, Extent):
                    (plain if chunk.format.is_plain else encoded).append((chunk, value))
                elif chunk.format.is_plain:
                    wrong.append(_inline(chunk, value))
                else:
                    short.append((chunk, value))
        futures = self._reader.start(plain)
        futures += self._reader.start_encoded(encoded, decode, self._decoder.read)
        wrong += [*(decode(short) if short else ()), *self._decoder.read(somewhere)]
        found = [one for one in wrong if one is not None]
        return [*futures, Done(found)] if found else futures

    def _chunks(self, request: Request) -> Iterator[tuple[Chunk, Extent | bytes | None]]:
        leaf, form, _, targets = request
        saved = self._digests.get(leaf)
        plan, values = self._plan_of(request, saved), self._values
        known = saved.digests if saved is not None else None
        for read, key, piece in zip(plan.reads, plan.keys, plan.pieces, strict=True):
            value = None
            if values is not None and (value := values.get(leaf + key)) is None:
                raise MissingChunkError(f"leaf {leaf}, key {key[1:]}")
            digest = None
            if known is not None:
                if piece >= 0:
                    digest = known[piece]
                else:
                    self.unchecked.add(leaf)
            yield Chunk(leaf, form, read, targets, digest), value

    def _plan_of(self, request: Request, saved: LeafDigests | None) -> Plan:
        # By identity: leaves that are alike share their boxes, and a plan keeps them alive.
        boxes, pieces = request.boxes, saved.boxes if saved is not None else ()
        what = (saved.dtype, saved.shape) if saved is not None else None
        kind = request.form, id(boxes), id(pieces), what
        if (plan := self._plans.get(kind)) is None:
            _refuse_misfit(request, saved)
            plan = self._plans[kind] = plan_of(request.form, boxes, pieces)
        return plan

    @property
    def n_bytes(self) -> int:
        """How many bytes were read."""
        return self._source.n_bytes + self._decoder.n_bytes

    @property
    def requests(self) -> int:
        """In how many reads."""
        return self._source.requests + self._decoder.requests

    def close(self) -> None:
        """Waits for the threads, and closes files."""
        self._reader.close()


def _refuse_misfit(request: Request, saved: LeafDigests | None) -> None:
    """Checks that a leaf is stored as it was saved: the same bytes may be other numbers.

    Raises:
        ValueError: it is not.
    """
    found = request.form.dtype.name, request.form.shape
    if saved is not None and found != (saved.dtype, saved.shape):
        what = f"{found[0]}{list(found[1])}, saved was {saved.dtype}{list(saved.shape)}"
        raise ValueError(f"leaf {request.leaf}: found {what}")


def plan_of(form: ArrayFormat, boxes: tuple[Box, ...], saved: tuple[Box, ...]) -> Plan:
    """Plans the leaves of one kind.

    Args:
        form: how they are stored.
        boxes: what is wanted of each.
        saved: the pieces of which there are digests.
    """
    reads = chunk_reads(form.shape, form.chunk, form.dtype.itemsize, boxes)
    places = {box: i for i, box in enumerate(saved)}
    keys = tuple(f"/{form.key(read.position)}" for read in reads)
    return Plan(reads, keys, tuple(places.get(read.box, -1) for read in reads), (boxes, saved))


def _inline(chunk: Chunk, value: bytes) -> Piece | None:
    """Takes a chunk that was in the tree of the database itself."""
    n_bytes = chunk.format.chunk_bytes
    if value[n_bytes:] != chunk.format.tail or len(value) < n_bytes:
        where = f"leaf {chunk.leaf}, chunk {list(chunk.read.position)}"
        raise MalformedCheckpointError(where, f"{len(value)} bytes", f"{n_bytes}, as they are")
    return arrived(chunk, memoryview(value)[:n_bytes])
