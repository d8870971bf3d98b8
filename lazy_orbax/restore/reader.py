"""Reads chunks that are stored as they lie in memory: few large reads, straight to where they go.

Neighbours in a file are read at once and scattered. The digest of each chunk is taken while it is
in the processor's cache. What is encoded in some way is read in `decoder.py`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.integrity import digest
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.reads import Run, coalesced, rows_of
from lazy_orbax.plan.runs import runs
from lazy_orbax.restore.chunk import Chunk, arrived, arrived_in_place, check_tail, put
from lazy_orbax.restore.memory import aligned, rounded_up
from lazy_orbax.restore.source import Source
from lazy_orbax.storage.threads import Crew
from lazy_orbax.trust.ocdbt_nodes import Extent

Decode = Callable[[Sequence[tuple[Chunk, memoryview]]], list[Piece]]
ReadAndDecode = Callable[[Sequence[Chunk]], list[Piece]]


class Reader:
    """Reads, in several threads. What it was given to read is there when `futures` are done."""

    def __init__(self, source: Source):
        self._source = source
        self._crew = Crew("lazy_orbax-restore", source.concurrency)

    def start(self, chunks: Iterable[tuple[Chunk, Extent]]) -> list[Any]:
        """Starts to read plain chunks.

        Args:
            chunks: each with where it lies.

        Returns:
            Futures of lists of the pieces that are not what was saved.

        Raises:
            MalformedCheckpointError: two lie on top of each other, or one has not the length that
                it should have.
        """
        members = list(chunks)
        for chunk, extent in members:
            length = chunk.format.chunk_bytes + len(chunk.format.tail)
            if extent.length != length:
                where = f"{extent.file}, leaf {chunk.leaf}, chunk {list(chunk.read.position)}"
                found = f"{extent.length} bytes"
                raise MalformedCheckpointError(where, found, f"{length}: they are not encoded")
        futures = []
        for file, run, mine in self._runs(members):
            work = self._read_large if self._is_large(run) else self._read_run
            futures.append(self._crew.submit(work, file, run, mine))
        return futures

    def start_encoded(
        self, chunks: Iterable[tuple[Chunk, Extent]], decode: Decode, large: ReadAndDecode
    ) -> list[Any]:
        """Starts to read chunks that are encoded in some way.

        Args:
            chunks: each with where it lies.
            decode: is given some of them with what is stored, in one of the threads, and returns
                the pieces that are not what was saved.
            large: does all of it for a large one, which then is copied less often.

        Returns:
            Futures of these lists.

        Raises:
            MalformedCheckpointError: two lie on top of each other.
        """

        def read(file: str, run: Run, members: list[tuple[Chunk, Extent]]) -> list[Piece]:
            memory = aligned(run.stop - run.start).data
            self._source.read(file, run.start, [memory])
            found = []
            for chunk, extent in (members[i] for i in run.members):
                start = extent.offset - run.start
                found.append((chunk, memory[start : start + extent.length]))
            return decode(found)

        futures = []
        for file, run, members in self._runs(chunks):
            if self._is_large(run):
                futures.append(self._crew.submit(large, [members[run.members[0]][0]]))
            else:
                futures.append(self._crew.submit(read, file, run, members))
        return futures

    def _is_large(self, run: Run) -> bool:
        return len(run.members) == 1 and run.stop - run.start > self._source.large_bytes

    def _runs(
        self, chunks: Iterable[tuple[Chunk, Extent]]
    ) -> Iterator[tuple[str, Run, list[tuple[Chunk, Extent]]]]:
        by_file: dict[str, list[tuple[Chunk, Extent]]] = collections.defaultdict(list)
        for chunk, extent in chunks:
            by_file[extent.file].append((chunk, extent))
        for file, members in by_file.items():
            runs = coalesced(
                [(extent.offset, extent.length) for _, extent in members],
                gap_bytes=self._source.gap_bytes,
                most_bytes=self._source.run_bytes,
                most_members=self._source.most_buffers // 3,
            )
            for run in _apart(file, runs):
                yield file, run, members

    def close(self) -> None:
        """Waits for the threads, and closes files."""
        self._crew.close(None)
        self._source.close()

    def _read_run(self, file: str, run: Run, members: list[tuple[Chunk, Extent]]) -> list[Piece]:
        mine = [members[i] for i in run.members]
        places = [chunk.places for chunk, _ in mine]
        elsewhere = [
            c.format.chunk_bytes for (c, _), own in zip(mine, places, strict=True) if not own
        ]
        spare = aligned(sum(map(rounded_up, elsewhere))).data
        gap = memoryview(bytearray(self._source.gap_bytes))
        buffers, tails, memories, position = [], [], [], run.start
        for (chunk, extent), own in zip(mine, places, strict=True):
            if extent.offset > position:
                buffers.append(gap[: extent.offset - position])
            if own:
                memory = own
            else:
                n_bytes = chunk.format.chunk_bytes
                memory, spare = [spare[:n_bytes]], spare[rounded_up(n_bytes) :]
            memories.append(memory)
            buffers += memory
            if chunk.format.tail:
                tails.append((chunk, tail := bytearray(len(chunk.format.tail))))
                buffers.append(memoryview(tail))
            position = extent.offset + extent.length
        self._source.read(file, run.start, buffers)
        for chunk, tail in tails:
            check_tail(chunk, tail)
        found = [
            arrived_in_place(chunk, own) if own else arrived(chunk, memory[0])
            for (chunk, _), memory, own in zip(mine, memories, places, strict=True)
        ]
        return [wrong for wrong in found if wrong is not None]

    def _read_large(self, file: str, run: Run, members: list[tuple[Chunk, Extent]]) -> list[Piece]:
        (chunk, extent) = members[run.members[0]]
        hasher = digest.hasher() if chunk.digest is not None else None
        fill = self._fill_places if chunk.places else self._scatter_rows
        done = fill(file, extent, chunk, hasher)
        if chunk.format.tail:
            tail = bytearray(len(chunk.format.tail))
            self._source.read(file, extent.offset + done, [memoryview(tail)])
            check_tail(chunk, tail)
        wrong = hasher is not None and hasher.intdigest() != chunk.digest
        return [chunk.piece] if wrong else []

    def _fill_places(self, file: str, extent: Extent, chunk: Chunk, hasher: Any) -> int:
        most_bytes, done = self._source.part_bytes, 0
        own = (
            place[first : first + most_bytes]
            for place in chunk.places
            for first in range(0, len(place), most_bytes)
        )
        for together in runs(own, len, most_bytes, self._source.most_buffers):
            self._source.read(file, extent.offset + done, together)
            for memory in together:
                done += len(memory)
                if hasher is not None:
                    hasher.update(memory)
        return done

    def _scatter_rows(self, file: str, extent: Extent, chunk: Chunk, hasher: Any) -> int:
        form, done = chunk.format, 0
        memory = aligned(max(self._source.part_bytes, form.dtype.itemsize))
        for rows in rows_of(chunk.read, form.chunk, form.dtype.itemsize, self._source.part_bytes):
            n_bytes = math.prod(rows.box.shape) * form.dtype.itemsize
            self._source.read(file, extent.offset + done, [memory.data[:n_bytes]])
            done += n_bytes
            data = memory[:n_bytes].view(form.dtype).reshape(rows.box.shape)
            if hasher is not None and rows.kept is not None:
                hasher.update(digest.bytes_of(data[rows.kept]))
            for one in rows.placed:
                put(chunk.targets[one.wanted], one.target, data[(*one.source, ...)])
        return done


def _apart(file: str, runs: Iterator[Run]) -> list[Run]:
    try:
        return list(runs)
    except ValueError as error:
        raise MalformedCheckpointError(file, str(error), "values beside each other") from error
