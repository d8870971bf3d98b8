"""`merge`: a linear combination of checkpoints, out of core. The story of it, from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from lazy_orbax import _paths
from lazy_orbax._machine import without_garbage_collection
from lazy_orbax.combine.merge_output import Layout, Output
from lazy_orbax.combine.merge_plan import Unit, share_of
from lazy_orbax.combine.merge_sources import Wanted, digest_of_digests, matched, wanted_of
from lazy_orbax.combine.merge_team import Team
from lazy_orbax.combine.merge_work import Work, planned
from lazy_orbax.combine.schedules import Schedule, merge_coefficients
from lazy_orbax.errors import OptionError
from lazy_orbax.restore.opened import item_at, opened
from lazy_orbax.restore.transformed import Checkpoint
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import duration_of, size_of
from lazy_orbax.view.viewed import Viewed

_MIB = 2**20
_COLUMNS = (Column("source"), Column("coefficient", is_number=True))


@dataclasses.dataclass(frozen=True)
class Merged(Viewed):
    """What `merge` made.

    Attributes:
        path: the step.
        sources: the items it was made of.
        coefficients: of each.
        n_averaged: how many leaves were averaged.
        n_copied: how many arrays were copied, for they hold no floats.
        bytes_read: bytes that this process read.
        bytes_written: bytes that this process wrote, before compression.
        duration_s: how long that took.
    """

    path: str
    sources: tuple[str, ...]
    coefficients: tuple[float, ...]
    n_averaged: int
    n_copied: int
    bytes_read: int
    bytes_written: int
    duration_s: float

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = tuple((s, f"{c:.6g}") for s, c in zip(self.sources, self.coefficients, strict=True))
        done = (
            f"{self.n_averaged} leaves averaged, {self.n_copied} copied; "
            f"{size_of(self.bytes_read)} read, {size_of(self.bytes_written)} written in "
            f"{duration_of(self.duration_s)}"
        )
        return (Table(_COLUMNS, rows, self.path), Lines((done,)))


def merge(  # noqa: PLR0913 - Keywords, of which most calls give none.
    sources: Sequence[Any],
    coefficients: Schedule,
    out: Any,
    *,
    others: int | None = None,
    dtype: Any = None,
    accumulator: str = "float32",
    host_bytes: int = 256 * _MIB,
    verify: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Writes the linear combination of some checkpoints as a step that Orbax restores.

    It reads a few chunks of each source at a time, adds them up in the order of the sources, and
    writes the sum; no device and no model is needed. Each product and each sum is rounded to the
    accumulator's dtype, and the result once to its own. The step is like the first source: tree,
    kinds, chunks and format on disk. It has no other item of that step, and its custom metadata say
    under `lazy_orbax_merge` what it was made of. It appears whole, or not at all.

    In a job of several processes (`jax.distributed`) all of them call it alike; each merges a share
    into a directory that all must see.

    Args:
        sources: the checkpoints, oldest first: directories or `gs://` addresses of items, or of
            steps that have one item. By whatever handler, in any format, chunks and sharding.
        coefficients: one number for each, or a schedule such as `"cosine"`: see
            `merge_coefficients`.
        out: the directory or `gs://` address of the step, which must not be there.
        others: position of the source from which leaves are taken that are no floats: integers,
            booleans, keys, strings. `None`: they must be equal in all sources.
        dtype: of the averaged leaves in the result. `None` is that of the sources, which must be
            the same in all then.
        accumulator: `"float32"` or `"float64"`. Leaves of float64 are added up in that anyway.
        host_bytes: most bytes of host memory for what is added up, unless one chunk of the result
            needs more. Readers and writers have up to some 100 MB beside that.
        verify: compare what is read with the digests that were saved with it.
        on_progress: is called with the bytes that were done, and with all there are.

    Returns:
        What was done.

    Raises:
        OptionError: a keyword is out of range, there is no such checkpoint, or `out` is there.
        MergeError: the sources do not fit each other. It names every leaf.
        CorruptCheckpointError: a source is not what was saved.
        MalformedCheckpointError: a source is not a checkpoint that Orbax wrote.
        SaveError: the result could not be written.
    """
    paths = _paths_of(sources, out)
    if not isinstance(host_bytes, int) or isinstance(host_bytes, bool) or host_bytes < _MIB:
        raise OptionError(f"host_bytes={host_bytes!r} must be at least {_MIB} (1 MiB).")
    order = _Order(
        *(paths, os.fspath(out), coefficients, merge_coefficients(coefficients, len(paths))),
        *(wanted_of(dtype, accumulator, others, len(paths)), host_bytes, verify, on_progress),
    )
    return _carried_out(order)


class _Order(NamedTuple):
    """What `merge` was asked for, after it was checked."""

    paths: list[Any]
    out: str
    schedule: Schedule
    coefficients: tuple[float, ...]
    wanted: Wanted
    host_bytes: int
    verify: bool
    on_progress: Callable[[int, int], None] | None


def _carried_out(order: _Order) -> Merged:
    begun_s, team, limit_bytes = time.monotonic(), Team(), order.host_bytes
    with contextlib.ExitStack() as stack:
        with team.together(), without_garbage_collection():
            sources = [opened(item_at(path), order.verify) for path in order.paths]
            leaves = matched(sources, order.wanted)
            layout = Layout(order.out, sources[0], sources[order.wanted.others or 0])
            copied, averaged = planned(leaves, limit_bytes // 2)
            lineage = _lineage(sources, order)
            root = layout.temporary(team.number())
        with team.together():
            if team.index == 0:
                stack.callback(layout.remove, root)
                layout.create(root)
        with team.together():
            output = stack.enter_context(Output(layout, root, leaves, team.index))
            work = Work(sources, order.coefficients, leaves, output.writer, limit_bytes)
            stack.callback(work.close)
            progress = _Progress(order.on_progress, (*copied, *averaged), output)
            copy = functools.partial(work.copy, others=order.wanted.others)
            work.run(share_of(copied, team.index, team.size), copy, progress.done)
            work.refuse_differing()
        with team.together():
            work.run(share_of(averaged, team.index, team.size), work.merge, progress.done)
            work.refuse_wrong()
            output.finish(lineage, team.size)
        with team.together():
            if team.index == 0:
                output.publish(lineage, team.size)
    n_averaged = sum(leaf.total is not None for leaf in leaves)
    directories = tuple(source.contents.directory for source in sources)
    return Merged(
        *(layout.final, directories, order.coefficients, n_averaged, len(leaves) - n_averaged),
        *(work.bytes_read, output.writer.n_bytes, time.monotonic() - begun_s),
    )


def _paths_of(sources: Sequence[Any], out: Any) -> list[Any]:
    """Checks the paths.

    Raises:
        OptionError: they are none.
    """
    if isinstance(sources, str | os.PathLike) or not isinstance(sources, Iterable):
        raise OptionError(f"sources={sources!r} must be several checkpoints. Give a list of paths.")
    paths = list(sources)
    if not paths:
        raise OptionError("There are no sources. Give a list of the paths of checkpoints.")
    if not isinstance(out, str | os.PathLike):
        raise OptionError(f"out={out!r} must be the path of the step that is made.")
    return paths


def _lineage(sources: Sequence[Checkpoint], order: _Order) -> dict[str, Any]:
    """Returns what the result is made of, as JSON values."""
    made_of = [
        {
            "path": source.contents.directory,
            "step": _paths.step_of_item(source.contents.directory),
            "coefficient": coefficient,
            "digest": digest_of_digests(source),
        }
        for source, coefficient in zip(sources, order.coefficients, strict=True)
    ]
    return {
        "sources": made_of,
        "schedule": order.schedule if isinstance(order.schedule, str) else None,
        "accumulator": order.wanted.accumulator,
        "dtype": None if order.wanted.dtype is None else order.wanted.dtype.name,
        "others": order.wanted.others,
    }


class _Progress:
    """How far a merge is."""

    def __init__(
        self, tell: Callable[[int, int], None] | None, units: Sequence[Unit], output: Output
    ):
        self._tell, self._output = tell, output
        self._all_bytes = sum(unit.n_bytes for unit in units)
        self._done_bytes = 0

    def done(self, unit: Unit) -> None:
        """Notes that a unit is done."""
        self._output.begin_sync()
        self._done_bytes += unit.n_bytes
        if self._tell:
            self._tell(self._done_bytes, self._all_bytes)
