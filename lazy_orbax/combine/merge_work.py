"""Reads, adds up and writes units, in a few threads and within a budget of memory."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lazy_orbax.combine.merge_arithmetic import add, combine, round_to
from lazy_orbax.combine.merge_plan import Cut, Part, Unit, regions_in, units_of
from lazy_orbax.combine.merge_sources import MergedLeaf
from lazy_orbax.combine.merge_writer import LeafWriter
from lazy_orbax.errors import MergeError
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.boxes import Box
from lazy_orbax.restore.chunk import Target
from lazy_orbax.restore.memory import aligned
from lazy_orbax.restore.opened import missing_is_corrupt, raise_wrong
from lazy_orbax.restore.planned import Job, Request
from lazy_orbax.restore.transformed import Checkpoint
from lazy_orbax.snapshot.host_budget import HostBudget, Lease
from lazy_orbax.storage.threads import Crew
from lazy_orbax.timeline import RestoreRecorder

# One reads while another adds up and a third one writes.
_THREADS = 4
_ROUNDED_BYTES = 2**20


class Place(NamedTuple):
    """The memory of a part: its regions, each as bytes."""

    part: Part
    regions: tuple[np.ndarray, ...]


class Work:
    """A merge on its way.

    Attributes:
        wrong: for each source, the pieces that are not what was saved.
    """

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        coefficients: Sequence[float],
        leaves: Sequence[MergedLeaf],
        writer: LeafWriter,
        limit_bytes: int,
    ):
        """Opens the sources.

        Args:
            sources: the checkpoints.
            coefficients: one for each.
            leaves: of the result.
            writer: writes them.
            limit_bytes: most memory.
        """
        self._sources, self._coefficients = sources, coefficients
        self._leaves, self._writer = leaves, writer
        # What is compressed or encoded in another way is held once more while it is coded.
        are_plain = all(form.is_plain for leaf in leaves for form in leaf.forms if leaf.total)
        self._limit_bytes = limit_bytes if are_plain else limit_bytes // 2
        self._jobs = [Job(one.contents, one.stored.leaves if one.stored else {}) for one in sources]
        self._boxes: dict[tuple[Box, ...], tuple[Box, ...]] = {}
        self.wrong: list[list[Piece]] = [[] for _ in sources]
        self._differing: dict[str, int] = {}

    def close(self) -> None:
        """Closes the sources."""
        for job in self._jobs:
            job.close()

    @property
    def bytes_read(self) -> int:
        """How many bytes were read."""
        return sum(job.n_bytes for job in self._jobs)

    def run(
        self,
        units: Sequence[Unit],
        do: Callable[[list[Place]], None],
        done: Callable[[Unit], None],
    ) -> None:
        """Does units, several at once.

        Args:
            units: what to do.
            do: does one, in memory that is its own meanwhile.
            done: is told of each that is done, in this thread.
        """
        budget, crew = HostBudget(), Crew("lazy_orbax-merge", _THREADS)
        running: collections.deque[tuple[Unit, Any]] = collections.deque()

        def collect(most: int) -> None:
            while len(running) > most or (running and running[0][1].done()):
                unit, future = running.popleft()
                future.result()
                done(unit)

        with contextlib.ExitStack() as stack:
            stack.callback(crew.close, None)
            for unit in units:
                n_bytes = -(-unit.n_bytes // _ROUNDED_BYTES) * _ROUNDED_BYTES
                lease = budget.reserve(
                    n_bytes, limit_bytes=self._limit_bytes, aborted=lambda: False, kind=n_bytes
                )
                running.append((unit, crew.submit(_do, unit, lease, n_bytes, do)))
                collect(2 * _THREADS)
            collect(0)

    def merge(self, places: list[Place]) -> None:
        """Averages the parts of a unit, and writes them. All of them are read in the same way."""
        is_together = _are_read_together(self._leaves[places[0].part.leaf])
        results = self._together(places) if is_together else self._in_turn(places)
        self._writer.wait(
            [self._write(place.part, one) for place, one in zip(places, results, strict=True)]
        )

    def _together(self, places: list[Place]) -> Iterator[np.ndarray]:
        """Reads all sources at once, each into a region of its own, and adds them up."""
        sources = range(len(self._sources))
        reads = [self._start(i, places, [i] * len(places)) for i in sources]
        for i in sources:
            self._finish(i, reads[i])
        for (part, regions), n in zip(places, map(_size, places), strict=True):
            leaf = self._leaves[part.leaf]
            forms = zip(regions, leaf.forms, strict=False)  # One more may be there for the result.
            arrays = [region.view(form.dtype)[:n] for region, form in forms]
            into = regions[0 if len(regions) == len(arrays) else -1].view(leaf.dtype)[:n]
            combine(into, arrays, self._coefficients, _total(leaf))
            yield into

    def _in_turn(self, places: list[Place]) -> Iterator[np.ndarray]:
        """Reads one source after the other, and adds it to the sums."""
        for i, factor in enumerate(self._coefficients):
            self._read(i, places, [self._reads_into(i, place) for place in places])
            for place in places:
                into = self._reads_into(i, place)
                leaf = self._leaves[place.part.leaf]
                data = place.regions[into].view(leaf.forms[i].dtype)[: _size(place)]
                add(place.regions[0].view(_total(leaf)), data, factor, is_first=i == 0)
        for part, (memory, read) in places:
            leaf = self._leaves[part.leaf]
            result = total = memory.view(_total(leaf))
            if leaf.dtype != leaf.total:
                result = read.view(leaf.dtype)[: total.size]  # Nothing is read any more.
                round_to(result, total)
            yield result

    def _reads_into(self, i: int, place: Place) -> int:
        """Returns the region into which a source is read: the first one goes where the sum is."""
        leaf = self._leaves[place.part.leaf]
        return 0 if i == 0 and leaf.forms[0].dtype == leaf.total else 1

    def copy(self, places: list[Place], others: int | None) -> None:
        """Copies the parts of a unit from one source, and compares them with all others."""
        self._read(others or 0, places, [0] * len(places))
        for i in range(1, len(self._sources)) if others is None else ():
            self._read(i, places, [1] * len(places))
            for part, (kept, found) in places:
                if not np.array_equal(kept, found):
                    self._differing.setdefault(self._leaves[part.leaf].name, i)
        if others is None and self._differing:
            return
        writes = []
        for part, (kept, *_) in places:
            writes.append(self._write(part, kept.view(self._leaves[part.leaf].dtype)))
        self._writer.wait(writes)

    def refuse_differing(self) -> None:
        """Checks that what is copied was the same in all sources.

        Raises:
            MergeError: it was not.
        """
        if self._differing:
            raise MergeError(
                [
                    f"leaf {name}: found another value in source {i} than in source 0; it is no "
                    "float, so give `others`, the source to take it from"
                    for name, i in self._differing.items()
                ]
            )

    def refuse_wrong(self) -> None:
        """Checks that what was read is what was saved.

        Raises:
            CorruptCheckpointError: it is not.
        """
        for source, job, wrong in zip(self._sources, self._jobs, self.wrong, strict=True):
            raise_wrong(source, wrong, frozenset(job.unchecked))

    def _read(self, i: int, places: list[Place], regions: list[int]) -> None:
        self._finish(i, self._start(i, places, regions))

    def _start(self, i: int, places: list[Place], regions: list[int]) -> list[Any]:
        with self._explained(i):
            wanted: dict[int, list[tuple[Box, Target]]] = {}
            for place, region in zip(places, regions, strict=True):
                target = self._target(i, place, place.regions[region])
                wanted.setdefault(place.part.leaf, []).append((place.part.box, target))
            return self._jobs[i].start([self._request(i, *one) for one in wanted.items()])

    def _finish(self, i: int, futures: list[Any]) -> None:
        with self._explained(i):
            for future in futures:
                self.wrong[i] += future.result()

    def _explained(self, i: int) -> Any:
        source = self._sources[i]
        return missing_is_corrupt(RestoreRecorder(source.contents.directory), source)

    def _target(self, i: int, place: Place, region: np.ndarray) -> Target:
        form = self._leaves[place.part.leaf].forms[i]
        memory = region[: _size(place) * form.dtype.itemsize]
        return Target(memory.view(form.dtype).reshape(place.part.box.shape), memory.data)

    def _request(self, i: int, position: int, wanted: list[tuple[Box, Target]]) -> Request:
        """Asks for all parts of a leaf: a chunk that several want is read once."""
        leaf, boxes = self._leaves[position], tuple(box for box, _ in wanted)
        # The same object for the same boxes: a job plans alike what is alike, by identity.
        boxes = self._boxes.setdefault(boxes, boxes)
        return Request(leaf.name, leaf.forms[i], boxes, tuple(target for _, target in wanted))

    def _write(self, part: Part, data: np.ndarray) -> Any:
        n = int(np.prod(part.box.shape))
        return self._writer.write(part.leaf, part.box, data[:n].reshape(part.box.shape))


def _total(leaf: MergedLeaf) -> np.dtype:
    assert leaf.total is not None
    return leaf.total


def _size(place: Place) -> int:
    return int(np.prod(place.part.box.shape))


def _do(unit: Unit, lease: Lease, n_bytes: int, do: Callable[[list[Place]], None]) -> None:
    """Does a unit in the memory of a lease, which ends with it."""
    memory = None
    try:
        memory = lease.buffer if lease.buffer is not None else aligned(n_bytes)
        do(
            [
                Place(part, tuple(memory[start:stop] for start, stop in regions))
                for part, regions in zip(unit.parts, regions_in(unit), strict=True)
            ]
        )
    finally:
        lease.release(memory)


def planned(
    leaves: Sequence[MergedLeaf], limit_bytes: int
) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """Returns the units of the leaves that are copied, and of those that are averaged.

    Args:
        leaves: of the result.
        limit_bytes: most memory of a unit.
    """
    cuts = [
        (i, Cut(leaf.shape, leaf.forms[0].chunk, tuple(f.chunk for f in leaf.forms), _needs(leaf)))
        for i, leaf in enumerate(leaves)
    ]
    sorts = [None if leaf.total is None else _are_read_together(leaf) for leaf in leaves]
    copied, together, in_turn = (
        tuple(units_of([cut for cut in cuts if sorts[cut[0]] is sort], limit_bytes))
        for sort in (None, True, False)
    )
    return copied, (*together, *in_turn)


def _needs(leaf: MergedLeaf) -> tuple[int, ...]:
    """Returns the bytes of an element in each region of memory."""
    if leaf.total is None:
        return (max(form.dtype.itemsize for form in leaf.forms),) * 2
    together, in_turn = _ways(leaf)
    return together if _are_read_together(leaf) else in_turn


def _ways(leaf: MergedLeaf) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Returns that for each source, and a wide result; and for a sum, and what is read."""
    stored, own = tuple(form.dtype.itemsize for form in leaf.forms), leaf.dtype.itemsize
    together = stored if own <= stored[0] else (*stored, own)
    return together, (_total(leaf).itemsize, max(*stored, own))


def _are_read_together(leaf: MergedLeaf) -> bool:
    """Whether all sources at once take no more memory than the sum and one of them."""
    together, in_turn = _ways(leaf)
    return sum(together) <= sum(in_turn)
