"""How two checkpoints differ: in structure, by digest, and in numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import OptionError, Problem
from lazy_orbax.inspection.leaves import ItemLeaves, LeafEntry
from lazy_orbax.inspection.looking import ITEM, RUN, STEP, items_of, look, newest_step
from lazy_orbax.integrity.digest_file import LeafDigests
from lazy_orbax.integrity.sidecar_files import string_at
from lazy_orbax.integrity.step_place import is_item
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.storage.places import place_of
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.viewed import Viewed

ONLY_A, ONLY_B, KIND, SHAPE, VALUES = "only in a", "only in b", "type", "shape", "values"
UNKNOWN = "not compared"
_COLUMNS = (Column("leaf"), Column("differs"), Column("a"), Column("b"))
_STATS = tuple(Column(name, is_number=True) for name in ("elements", "largest", "norm", "relative"))


@dataclasses.dataclass(frozen=True)
class LeafDifference:
    """A leaf that is not known to be the same in both.

    Attributes:
        item: the item that it is of.
        name: of the leaf, as Orbax names it.
        what: `only in a`, `only in b`, `type`, `shape` or `values`; `not compared` where there are
            no digests that could be.
        a: what it is in the first checkpoint.
        b: in the second.
        n_different: how many elements differ, where the values were read.
        max_abs: the largest absolute difference of two elements.
        norm: the Euclidean norm of the difference.
        relative: that, divided by the norm of the leaf in the first checkpoint.
    """

    item: str
    name: str
    what: str
    a: str = ""
    b: str = ""
    n_different: int | None = None
    max_abs: float | None = None
    norm: float | None = None
    relative: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference(Viewed):
    """What `diff` found.

    Attributes:
        a: the first checkpoint.
        b: the second.
        n_same: how many leaves are the same in both.
        leaves: those that are not known to be.
        problems: what could not be read.
    """

    a: str
    b: str
    n_same: int
    leaves: tuple[LeafDifference, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether both are known to be the same."""
        return not self.leaves and not self.problems

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        shown: list[Block] = [Lines((f"a: {self.a}", f"b: {self.b}"))]
        if self.leaves:
            several = len({leaf.item for leaf in self.leaves}) > 1
            rows = tuple(_row(leaf, several) for leaf in self.leaves)
            shown.append(Table(_COLUMNS + _STATS, rows).without_empty_columns())
        unknown = sum(leaf.what == UNKNOWN for leaf in self.leaves)
        counts = f"{self.n_same} leaves are the same, {len(self.leaves) - unknown} differ"
        more = f", {unknown} were not compared: --stats reads them" if unknown else ""
        shown.append(Lines((counts + more,)))
        if self.problems:
            shown.append(Lines(tuple(map(str, self.problems)), "problem"))
        return tuple(shown)


def _row(leaf: LeafDifference, several: bool) -> tuple[str, ...]:
    name = f"{leaf.item}/{leaf.name}" if several else leaf.name
    numbers = (leaf.n_different, leaf.max_abs, leaf.norm, leaf.relative)
    stats = ("" if n is None else f"{n:.4g}" if type(n) is float else str(n) for n in numbers)
    return (name, leaf.what, leaf.a, leaf.b, *stats)


def diff(
    a: Any,
    b: Any,
    *,
    stats: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compares two checkpoints, from their metadata and digests alone unless `stats` are wanted.

    Args:
        a: the directory or `gs://` address of an item, of a step, or of a run, of which the newest
            committed step is taken.
        b: the other. If each has one item, these are compared, whatever they are called.
        stats: whether to read what differs or has no digests, a few megabytes at a time, and say
            how far it is apart.
        on_progress: is called with the bytes that were read, and with all that will be.

    Returns:
        The leaves that are not known to be the same.

    Raises:
        OptionError: there is no checkpoint.
        MalformedCheckpointError: one is not what Orbax writes.
        OSError: the storage refused.
    """
    places, items = [], []
    for path in (a, b):
        seen = look(path, (ITEM, STEP, RUN))
        seen = newest_step(seen) if seen.kind == RUN else seen
        places.append(str(seen.path))
        items.append({n: d for n, d in items_of(seen).items() if _is_tree(d)})
    for place, found in zip(places, items):
        if not found:
            raise OptionError(f"{place} has no item that is a tree.")
    first, second = items
    if len(first) == len(second) == 1:
        second = dict(zip(first, second.values()))
    comparing = _Comparing(stats, on_progress)
    for name in sorted(first.keys() | second.keys()):
        a = ItemLeaves(first[name]) if name in first else None
        b = ItemLeaves(second[name], like=a) if name in second else None
        comparing.compare(name, a, b)
    comparing.read_values()
    leaves = tuple(comparing.leaves)
    problems = tuple(comparing.problems)
    return Difference(places[0], places[1], comparing.n_same, leaves, problems)


def _is_tree(directory: str) -> bool:
    return is_item([child.name for child in place_of(directory).as_path().iterdir()])


class _Comparing:
    """What has been found so far.

    Attributes:
        n_same: leaves that are the same.
        leaves: those that are not known to be.
        problems: what could not be read.
    """

    def __init__(self, stats: bool, tell: Callable[[int, int], None] | None):
        self.n_same = 0
        self.leaves: list[LeafDifference] = []
        self.problems: list[Problem] = []
        self._stats, self._tell = stats, tell
        self._to_read: list[tuple[LeafDifference, ItemLeaves, ItemLeaves, int]] = []

    def compare(self, name: str, a: ItemLeaves | None, b: ItemLeaves | None) -> None:
        """Compares two items; one may be missing."""
        for leaf, entry in self._compared(name, a, b):
            if leaf is None:
                self.n_same += 1
            elif self._stats and leaf.what in (VALUES, UNKNOWN) and entry.dtype and a and b:
                self._to_read.append((leaf, a, b, entry.n_bytes))
            else:
                self.leaves.append(leaf)
        self.problems += [problem for item in (a, b) if item for problem in item.problems]

    def _compared(
        self, item: str, a: ItemLeaves | None, b: ItemLeaves | None
    ) -> Iterator[tuple[LeafDifference | None, LeafEntry]]:
        ours, theirs = ({e.name: e for e in i.entries} if i else {} for i in (a, b))
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            mine, other = ours.get(name), theirs.get(name)
            if mine is None or other is None or a is None or b is None:
                entry = mine or other
                assert entry is not None
                what = ONLY_A if mine else ONLY_B
                yield LeafDifference(item, name, what, _words(mine), _words(other)), entry
            elif what := _difference(a, b, mine, other):
                is_told = what in (KIND, SHAPE)
                texts = [_words(each) if is_told else "" for each in (mine, other)]
                yield LeafDifference(item, name, what, texts[0], texts[1]), mine
            else:
                yield None, mine

    def read_values(self) -> None:
        """Reads what differs or has no digests, if that is wanted."""
        if not self._to_read:
            return
        from lazy_orbax.inspection.values import arrays_of, deviation

        done_bytes, all_bytes = 0, sum(n_bytes for *_, n_bytes in self._to_read)

        def read(n_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += n_bytes
            if self._tell:
                self._tell(done_bytes, all_bytes)

        opened = functools.cache(arrays_of)
        for leaf, *pair, _ in self._to_read:
            first, second = (opened(item).open(leaf.name) for item in pair)
            try:
                found = deviation(first.result(), second.result(), read)
            except (ValueError, OSError) as error:
                self.problems.append(Problem(f"cannot be read: {error}", leaf=leaf.name))
                self.leaves.append(leaf)
                continue
            if found.is_same and leaf.what == UNKNOWN:
                self.n_same += 1
                continue
            numbers = dataclasses.asdict(found)
            is_same = numbers.pop("is_same")
            if is_same:  # What is stored has other digests, so one of them is corrupt.
                what = "its values are the same in both, and its digests are not: verify both"
                self.problems.append(Problem(what, leaf=leaf.name))
            self.leaves.append(dataclasses.replace(leaf, what=VALUES, **numbers))


def _difference(a: ItemLeaves, b: ItemLeaves, mine: LeafEntry, other: LeafEntry) -> str:
    """Returns in what a leaf differs; nothing if it is the same in both."""
    if (mine.kind, mine.dtype) != (other.kind, other.dtype):
        return KIND
    if mine.shape != other.shape:
        return SHAPE
    if mine.kind == "string":
        texts = _string(a, mine.name), _string(b, mine.name)
        return "" if texts[0] == texts[1] else VALUES
    if not mine.dtype or not mine.n_bytes:
        return ""
    digests = a.digests.get(mine.name), b.digests.get(mine.name)
    if digests[0] is not None and digests[0] == digests[1]:
        return ""
    pieces = [_pieces(each) for each in digests if each]
    if len(pieces) < 2 or pieces[0].keys() != pieces[1].keys():
        return UNKNOWN
    return "" if pieces[0] == pieces[1] else VALUES


def _pieces(leaf: LeafDigests) -> dict[Any, int]:
    return {(box.start, box.shape): d for box, d in zip(leaf.boxes, leaf.digests, strict=True)}


def _string(item: ItemLeaves, name: str) -> Any:
    content = item.contents.files.read(_paths.STRINGS, MOST_BYTES)
    return string_at(json.loads(content), name) if content else None


def _words(leaf: LeafEntry | None) -> str:
    if leaf is None:
        return ""
    return f"{leaf.dtype}{list(leaf.shape)}" if leaf.dtype else leaf.kind
