"""Leaves that are made of parts of stored ones: the wanted bytes are read, each of them once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.integrity.stored_item import Piece, StoredItem
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.transforms.takes import Fill, Take
from lazy_orbax.plan.transforms.transform_plan import TransformPlan
from lazy_orbax.restore.chunk import Target
from lazy_orbax.restore.groups import Group, grouped
from lazy_orbax.restore.planned import Job, Request, read_groups
from lazy_orbax.restore.wanted import Wanted
from lazy_orbax.timeline import RestoreRecorder
from lazy_orbax.trust.contents import Contents


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is read.

    Attributes:
        contents: what it holds.
        formats: how each array is stored, by its leaf.
        stored: its digests, if they are compared.
    """

    contents: Contents
    formats: Mapping[str, ArrayFormat]
    stored: StoredItem | None


class Transformed(NamedTuple):
    """What was read.

    Attributes:
        values: by position in the target.
        unchecked: for each checkpoint, the stored leaves whose digests were not compared.
        wrong: the pieces that are not what was saved, for each checkpoint.
    """

    values: dict[int, Any]
    unchecked: dict[str, frozenset[str]]
    wrong: dict[str, list[Piece]]


class _Later(NamedTuple):
    """A future that does something when it is asked."""

    action: Callable[[], None]

    def result(self) -> list[Piece]:
        """Does it."""
        self.action()
        return []


def read_transformed(
    wanted: Sequence[Wanted],
    plan: TransformPlan,
    checkpoints: Mapping[str, Checkpoint],
    *,
    limit_bytes: int,
    recorder: RestoreRecorder,
) -> Transformed:
    """Reads leaves.

    Args:
        wanted: the leaves.
        plan: what each is made of.
        checkpoints: where that is, by the name that the plan has for it.
        limit_bytes: most bytes of staging, where arrays do not take host memory as it is.
        recorder: is told what was read when.

    Raises:
        MissingChunkError: a chunk is not stored.
        ValueError: what is stored does not have the form that it should have.
        OSError: the storage refused.
    """
    with contextlib.closing(Reading(plan, checkpoints)) as reading:
        groups = list(grouped(families_of(wanted, plan), limit_bytes))
        staging = read_groups(groups, reading.start, limit_bytes=limit_bytes, recorder=recorder)
    recorder.note(bytes_read=reading.n_bytes, requests=reading.requests)
    return Transformed(staging.values, reading.unchecked, reading.wrong)


class Reading:
    """Reads what leaves are made of, into memory that others have.

    Attributes:
        wrong: the pieces that are not what was saved, for each checkpoint.
    """

    def __init__(self, plan: TransformPlan, checkpoints: Mapping[str, Checkpoint]):
        """Reads nothing yet. The arguments are those of `read_transformed`."""
        self._plan, self._checkpoints = plan, checkpoints
        self._jobs = {
            name: Job(one.contents, one.stored.leaves if one.stored is not None else {})
            for name, one in checkpoints.items()
        }
        self.wrong: dict[str, list[Piece]] = {name: [] for name in checkpoints}

    def start(self, group: Group, targets: Sequence[tuple[Target, ...]]) -> list[Any]:
        """Starts to read a group.

        Args:
            group: the leaves, and the boxes that are wanted of each.
            targets: where each box goes.

        Returns:
            Futures, whose results are to be asked for in this order.
        """
        requests, after = _requests(group, targets, self._plan, self._checkpoints)
        futures = [
            _Noted(future, self.wrong[name])
            for name, mine in requests.items()
            for future in self._jobs[name].start(mine)
        ]
        return [*futures, *map(_Later, after)]

    @property
    def unchecked(self) -> dict[str, frozenset[str]]:
        """For each checkpoint, the stored leaves whose digests were not compared."""
        return {name: frozenset(job.unchecked) for name, job in self._jobs.items()}

    @property
    def n_bytes(self) -> int:
        """How many bytes were read."""
        return sum(job.n_bytes for job in self._jobs.values())

    @property
    def requests(self) -> int:
        """In how many reads."""
        return sum(job.requests for job in self._jobs.values())

    def close(self) -> None:
        """Waits for the threads, and closes files."""
        with contextlib.ExitStack() as open_jobs:
            for job in self._jobs.values():
                open_jobs.callback(job.close)


class _Noted(NamedTuple):
    """A future whose pieces are noted for the checkpoint that they are of."""

    future: Any
    wrong: list[Piece]

    def result(self) -> list[Piece]:
        """Waits for it."""
        found = self.future.result()
        self.wrong.extend(found)
        return found


def families_of(wanted: Sequence[Wanted], plan: TransformPlan) -> Iterator[list[Wanted]]:
    """Brings leaves together that are made of the same stored one: it is read once."""
    parent = list(range(len(wanted)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first_with: dict[Any, int] = {}
    for i, leaf in enumerate(wanted):
        for origin in plan.leaves[leaf.name].origins:
            parent[root(i)] = root(first_with.setdefault(origin, i))
    families: dict[int, list[Wanted]] = {}
    for i, leaf in enumerate(wanted):
        families.setdefault(root(i), []).append(leaf)
    yield from families.values()


def _requests(
    group: Group,
    targets: Sequence[tuple[Target, ...]],
    plan: TransformPlan,
    checkpoints: Mapping[str, Checkpoint],
) -> tuple[dict[str, list[Request]], list[Callable[[], None]]]:
    """Returns what is read of each checkpoint, and what is done after that."""
    wanted: dict[Any, list[tuple[Box, Target]]] = collections.defaultdict(list)
    after: list[Callable[[], None]] = []
    for member, mine in zip(group.members, targets, strict=True):
        for box, target in zip(member.boxes, mine, strict=True):
            for part in plan.takes(member.wanted.name, box):
                if isinstance(part, Take):
                    view = target.array[part.index].transpose(part.axes).reshape(part.shape)
                    form = checkpoints[part.source].formats[part.leaf]
                    wanted[part.source, part.leaf].append((part.box, _target(view, form, target)))
                    if part.factor is not None:
                        after.append(_scaling(view, part.factor))
                else:
                    value = part.value if isinstance(part, Fill) else part.values()
                    target.array[part.index] = value
    found: dict[str, list[Request]] = collections.defaultdict(list)
    for (source, leaf), parts in wanted.items():
        boxes, views = zip(*parts, strict=True)
        form = checkpoints[source].formats[leaf]
        found[source].append(Request(leaf, form, boxes, views))
    return found, after


def _target(view: np.ndarray, form: ArrayFormat, whole: Target) -> Target:
    """Returns where a box goes, as bytes too if those of the file may go there."""
    in_one_piece = view.flags.c_contiguous and view.dtype == form.dtype and view.size
    memory = view.reshape(-1).view(np.uint8).data if in_one_piece else None
    return Target(view, memory, whole.rounds_once)


def _scaling(view: np.ndarray, factor: float) -> Callable[[], None]:
    def scale() -> None:
        with np.errstate(all="ignore"):  # NaNs, and what gets too large, are the caller's.
            view[...] = view * np.asarray(factor, view.dtype)

    return scale
