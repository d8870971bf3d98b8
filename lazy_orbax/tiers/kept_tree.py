"""From the pieces in memory to the tree: those of every process at hand, each compared first."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lazy_orbax._orbax.restored_kinds import SCALAR
from lazy_orbax.errors import CorruptCheckpointError, Problem, RestoreError, summarize
from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.integrity.digest import cast, digest_of_bytes
from lazy_orbax.integrity.stored_item import Piece
from lazy_orbax.plan.boxes import Box, Shape
from lazy_orbax.restore.chunk import Target
from lazy_orbax.restore.groups import Group, grouped
from lazy_orbax.restore.like import Likeness, likeness_of, likeness_of_stored
from lazy_orbax.restore.planned import read_groups
from lazy_orbax.restore.wanted import Wanted
from lazy_orbax.storage.threads import Crew
from lazy_orbax.tiers.snapshot_file import Snapshot, SnapshotError, read_memory
from lazy_orbax.timeline import RestoreRecorder
from lazy_orbax.trust.tree_file import Tree

# Of what only passes through host memory, on the way to devices.
_LIMIT_BYTES = 2**32
_MOST_THREADS = 8


class NotAtHandError(RestoreError):
    """Some of what is wanted is in the memory of other machines."""


class Kept(NamedTuple):
    """A piece in memory.

    Attributes:
        box: what of its leaf it is.
        memory: its bytes.
        digest: of these bytes.
    """

    box: Box
    memory: np.ndarray
    digest: int


class KeptTree:
    """One item at one step, as far as this machine has it.

    Attributes:
        directory: names it in messages.
        formats: shape and dtype of each leaf, by name.
        pieces: of each leaf, by name; those that several processes have, once.
        own: the shards that the processes at hand bring to a tier; others bring the others.
    """

    def __init__(self, snapshots: Sequence[Snapshot]):
        """Looks at what there is. No byte of a piece is read.

        Args:
            snapshots: of the processes of one run, of one item at one step.

        Raises:
            SnapshotError: what they say of themselves makes no sense.
        """
        self.directory = snapshots[0].path
        self.formats: dict[str, ArrayFormat] = {}
        self.pieces: dict[str, dict[Box, Kept]] = {}
        self.own: dict[str, list[Box]] = {}
        self._leaves: dict[str, Sequence[Any]] = {}
        self._texts: dict[str, str] = {}
        self._told = snapshots[0].layout
        try:
            for snapshot in snapshots:
                self._add(snapshot)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SnapshotError(f"{self.directory} makes no sense: {error!r}") from error

    def _add(self, snapshot: Snapshot) -> None:
        memory, layout = read_memory(snapshot.path), snapshot.layout
        digests = np.frombuffer(bytes.fromhex(snapshot.facts["digests"]), "<u8").tolist()
        self._texts.update(snapshot.facts["texts"])
        alike: dict[Any, ArrayFormat] = {}
        for leaf in layout["leaves"]:
            name, shape, dtype = leaf[0], tuple(leaf[2]), leaf[3]
            if (shape, dtype) not in alike:
                alike[shape, dtype] = ArrayFormat("kept", {}, shape, shape, np.dtype(dtype), True)
            known = self.formats.setdefault(name, alike[shape, dtype])
            if known.shape != shape or known.dtype.name != dtype:
                raise ValueError(f"leaf {name} is another on another process")
            self._leaves[name] = leaf
            self.pieces.setdefault(name, {})
        names = [leaf[0] for leaf in layout["leaves"]]
        for i, start in layout.get("own", ()):
            shard = Box(tuple(start), tuple(layout["leaves"][i][6]))
            self.own.setdefault(names[i], []).append(shard)
        for (i, offset, start, shape), digest in zip(layout["pieces"], digests, strict=True):
            box, form = Box(tuple(start), tuple(shape)), self.formats[names[i]]
            n_bytes = math.prod(box.shape) * form.dtype.itemsize
            part = memory[offset : offset + n_bytes]
            if part.size != n_bytes or not box.is_within(Box((0,) * len(form.shape), form.shape)):
                raise ValueError(f"a piece {box} of leaf {names[i]}")
            self.pieces[names[i]].setdefault(box, Kept(box, part, digest))

    def restored(
        self,
        like: Any,
        recorder: RestoreRecorder,
        *,
        is_part: bool = False,
        on_devices: bool = True,
    ) -> Any:
        """Returns the tree.

        Args:
            like: the tree that is wanted, as Orbax's restores take it; `None` is all that was
                kept, as nested dictionaries and lists.
            recorder: is told what came when.
            is_part: whether leaves may be left out.
            on_devices: whether what was on devices comes to one where `like` says no sharding.

        Raises:
            RestoreError: `like` does not fit what was kept.
            NotAtHandError: other machines have some of it.
            CorruptCheckpointError: a piece is not what was put there.
        """
        wanted = self._wanted(like, is_part)
        groups = list(grouped(((leaf,) for leaf in wanted.wanted), _LIMIT_BYTES))
        self._refuse_gaps(groups)
        n_threads = min(_MOST_THREADS, os.cpu_count() or 1)
        with contextlib.ExitStack() as stack:
            crew = Crew("lazy_orbax-kept", n_threads)
            stack.callback(crew.close, None)

            def start(group: Group, targets: Sequence[tuple[Target, ...]]) -> list[Any]:
                return [crew.submit(functools.partial(self._filled, group, targets))]

            found = read_groups(groups, start, limit_bytes=_LIMIT_BYTES, recorder=recorder)
        if found.wrong:
            wrong = [_unlike(leaf, box) for leaf, box, _ in found.wrong]
            raise CorruptCheckpointError(self.directory, wrong)
        recorder.mark("on_device", "verified")
        return self._rebuilt(wanted, found.values, like is None, on_devices)

    def stand_in(self) -> Any:
        """Returns the tree as `restored` does without devices, but zeros that take no memory."""
        wanted, values = self._wanted(None, False), dict[int, Any]()
        for leaf in wanted.wanted:
            zero = np.zeros((), leaf.dtype)
            is_number = leaf.kind == SCALAR
            values[leaf.position] = zero.item() if is_number else np.broadcast_to(zero, leaf.shape)
        return self._rebuilt(wanted, values, True, False)

    def shard_shapes(self) -> dict[str, Shape]:
        """Returns the shape of the shards of each leaf.

        Raises:
            SnapshotError: an older lazy_orbax took the snapshot, and did not say so.
        """
        try:
            return {name: tuple(leaf[6]) for name, leaf in self._leaves.items()}
        except IndexError as error:
            raise SnapshotError(f"{self.directory} is of an older lazy_orbax") from error

    def own_copies(self) -> dict[str, dict[Box, np.ndarray]]:
        """Returns the shards of `own`, in memory of their own. Each piece is compared first.

        Raises:
            NotAtHandError: a part of one is not here.
            CorruptCheckpointError: a piece is not what was put there.
        """
        copies: dict[str, dict[Box, np.ndarray]] = {}
        for name, box in ((name, box) for name, boxes in self.own.items() for box in boxes):
            if not self._has(name, box):
                raise NotAtHandError(f"{self.directory} does not have leaf {name}{box}")
            array = np.empty(box.shape, self.formats[name].dtype)
            copies.setdefault(name, {})[box] = array
            for kept in self._in(name, (box,)):
                if digest_of_bytes(kept.memory) != kept.digest:
                    raise CorruptCheckpointError(self.directory, [_unlike(name, kept.box)])
                common = box.overlap(kept.box) or box
                source = kept.memory.view(array.dtype).reshape(kept.box.shape)
                array[common.relative_to(box)] = source[common.relative_to(kept.box)]
        return copies

    def _wanted(self, like: Any, is_part: bool) -> Likeness:
        if like is None:
            return likeness_of_stored(self._tree(), self.formats)
        wanted = likeness_of(like, self.formats, None, None)
        named = {leaf.name for leaf in wanted.wanted} | set(wanted.strings)
        extra = sorted((set(self.formats) | set(self._texts)) - named)
        if extra and not is_part:
            listed = summarize([f"leaf {name}: found it, wanted no such leaf" for name in extra])
            raise RestoreError(f"What is wanted does not fit the snapshot:{listed}")
        return wanted

    def _tree(self) -> Tree:
        """Returns what was kept as a checkpoint would say it."""
        leaves, paths = {}, {}

        def add(path: Any, kind: str) -> None:
            keys = tuple((kind, text) for kind, text in path)
            paths[keys] = name = ".".join(text for _, text in keys)
            leaves[name] = kind

        for _, path, _, _, kind, *_ in self._leaves.values():
            add(path, kind if kind in ("array", "key", "numpy") else "scalar")
        for _, path in self._told["texts"]:
            add(path, "string")
        for path, kind in self._told["empty"]:
            add(path, kind)
        return Tree(leaves, paths, None, None, False, False)

    def _refuse_gaps(self, groups: Sequence[Group]) -> None:
        gaps = [
            f"leaf {member.wanted.name}{box}"
            for group in groups
            for member in group.members
            for box in member.boxes
            if not self._has(member.wanted.name, box)
        ]
        if gaps:
            raise NotAtHandError(f"The memory of this machine does not have:{summarize(gaps)}")

    def _has(self, name: str, box: Box) -> bool:
        pieces = self.pieces[name]
        if box in pieces:
            return True
        common = [part for piece in pieces if (part := box.overlap(piece)) is not None]
        n_elements = sum(math.prod(part.shape) for part in common)
        # Processes that keep a leaf by different rules might make up for a gap by an overlap.
        return n_elements == math.prod(box.shape) and _are_apart(common)

    def _filled(self, group: Group, targets: Sequence[tuple[Target, ...]]) -> list[Piece]:
        """Compares pieces and copies them. Returns those that are not what was kept."""
        wrong: list[Piece] = []
        for member, mine in zip(group.members, targets, strict=True):
            for kept in self._in(member.wanted.name, member.boxes):
                if digest_of_bytes(kept.memory) != kept.digest:
                    wrong.append(Piece(member.wanted.name, kept.box, kept.digest))
                    continue
                _copied(kept, member.wanted, member.boxes, mine)
        return wrong

    def _in(self, name: str, boxes: Sequence[Box]) -> list[Kept]:
        """Returns the pieces that have something of boxes of a leaf."""
        pieces = self.pieces[name]
        if all(box in pieces for box in boxes):
            return [pieces[box] for box in boxes]
        overlaps = lambda kept: any(kept.box.overlap(box) is not None for box in boxes)  # noqa: E731
        return [kept for kept in pieces.values() if overlaps(kept)]

    def _rebuilt(
        self, wanted: Likeness, values: dict[int, Any], is_all: bool, on_devices: bool
    ) -> Any:
        leaves = list(wanted.leaves)
        asked = {leaf.position: leaf for leaf in wanted.wanted}
        for position, value in values.items():
            kind, impl = self._leaves[asked[position].name][4:6]
            is_array = kind in ("array", "key") and not isinstance(leaves[position], np.ndarray)
            if is_array and on_devices and not isinstance(value, jax.Array):
                value = jax.device_put(value)  # It says no sharding: the default device.
            is_key = position in wanted.keys or (is_all and kind == "key")
            leaves[position] = jax.random.wrap_key_data(value, impl=impl) if is_key else value
        for name, position in wanted.strings.items():
            if name not in self._texts:
                raise RestoreError(f"leaf {name}: found no such string in {self.directory}")
            leaves[position] = self._texts[name]
        return wanted.rebuild(leaves)


def _unlike(leaf: str, box: Box) -> Problem:
    return Problem("the bytes are not those that were kept", leaf=leaf, index=str(box))


def _are_apart(boxes: Sequence[Box]) -> bool:
    """Whether no two boxes, of which none is empty, have an element in common."""
    starts = np.array([box.start for box in boxes], np.int64)
    ends = starts + np.array([box.shape for box in boxes], np.int64)
    meets = (starts[:, None] < ends).all(-1) & (starts < ends[:, None]).all(-1)
    return int(meets.sum()) == len(boxes)  # Each meets itself.


def _copied(kept: Kept, leaf: Wanted, boxes: Sequence[Box], targets: Sequence[Target]) -> None:
    assert leaf.form is not None
    source = kept.memory.view(leaf.form.dtype).reshape(kept.box.shape)
    for box, target in zip(boxes, targets, strict=True):
        common = kept.box.overlap(box)
        if common is not None or box == kept.box:
            common = common or box
            part = source[common.relative_to(kept.box)]
            target.array[common.relative_to(box)] = cast(part, leaf.dtype.name)
