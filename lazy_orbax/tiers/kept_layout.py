"""Which byte of a snapshot in memory is which piece of which leaf: made once for each plan."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax import restored_kinds
from lazy_orbax.errors import TreeError, summarize
from lazy_orbax.plan.boxes import Shape
from lazy_orbax.plan.shards import Leaf, ReplicaPolicy, is_key
from lazy_orbax.plan.slabs import Piece, Plan, make_plan
from lazy_orbax.tiers.snapshot_file import PAGE_BYTES

# Where a piece may start: what copies, and what reads, likes whole lines of the cache.
_ALIGNMENT = 64
_NUMBERS = {int: "int", float: "float", bool: "bool", complex: "complex"}
# Beside the digests, for what a snapshot says of itself.
_FACTS_BYTES = 2**14
_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a piece is.

    Attributes:
        index: which piece it is.
        offset: its first byte in the file.
        n_bytes: its size.
    """

    index: int
    offset: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class KeptLayout:
    """Where everything is in the file of a snapshot.

    Attributes:
        spots: by the `id` of the piece in the plan.
        text: what says so, as JSON.
        end: where the pieces end.
        others: leaves that no snapshot in memory has, with the reason.
    """

    spots: dict[int, Spot]
    text: bytes
    end: int
    others: tuple[str, ...]

    def file_bytes(self, texts: dict[str, str]) -> int:
        """Returns the size of a file that has room for it."""
        # A character is two escapes of six bytes at most.
        more_bytes = sum(12 * (len(name) + len(text)) + 16 for name, text in texts.items())
        facts_bytes = _FACTS_BYTES + _DIGEST_BYTES * len(self.spots) + more_bytes
        pages = -(-(self.end + len(self.text) + facts_bytes) // PAGE_BYTES)
        return pages * PAGE_BYTES

    def refuse_others(self) -> None:
        """Refuses a tree of which a snapshot in memory could not have all.

        Raises:
            TreeError: there are such leaves.
        """
        if self.others:
            raise TreeError(f"These leaves cannot be kept in memory:{summarize(list(self.others))}")


def layout_of(plan: Plan, item: Any) -> KeptLayout:
    """Returns where everything goes. It is kept with the plan.

    Args:
        plan: which pieces there are.
        item: a tree that the plan is for.
    """
    if "tiers" not in plan.kept:
        plan.kept["tiers"] = _made(plan, item)
    return plan.kept["tiers"]


def _made(plan: Plan, item: Any) -> KeptLayout:
    mine = {leaf.position: i for i, leaf in enumerate(plan.leaves)}
    leaves: list[list[Any]] = [[]] * len(plan.leaves)
    empty, texts, others = [], [], []
    for position, path, value in _flat(item):
        name = ".".join(text for _, text in path)
        if position is None:
            empty.append([path, _kind_of_empty(value)])
        elif position in mine:
            leaf = plan.leaves[mine[position]]
            kind, key = _kind_of(value)
            shard = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
            about = [leaf.name, path, leaf.shape, leaf.dtype.name, kind, key, shard]
            leaves[mine[position]] = about
        elif isinstance(value, str):
            texts.append([name, path])
        elif value is not ...:
            others.append(f"{name}: {type(value).__name__}; its type handler alone can save it")
    spots, pieces, end = {}, [], PAGE_BYTES
    for piece in (piece for slab in plan.slabs for piece in slab.pieces):
        n_bytes = math.prod(piece.shape) * plan.leaves[piece.leaf].dtype.itemsize
        spots[id(piece)] = Spot(len(pieces), end, n_bytes)
        pieces.append([piece.leaf, end, piece.start, piece.shape])
        end += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
    told = {"leaves": leaves, "pieces": pieces, "empty": empty, "texts": texts}
    told["own"] = list(_own(plan.leaves, jax.process_index()))
    text = json.dumps(told, separators=(",", ":")).encode()
    return KeptLayout(spots, text, end, tuple(others))


def _own(leaves: Sequence[Leaf], process: int) -> Iterator[tuple[int, Shape]]:
    """Yields the shards that a process brings to a tier, of those that have them: they take turns.

    Each is a leaf, and where it starts.
    """
    for i, leaf in enumerate(leaves):
        if leaf.sharding is None:
            if process == 0:
                yield i, (0,) * len(leaf.shape)
            continue
        for start, holders in _holders(leaf.sharding, leaf.shape).items():
            if holders[i % len(holders)] == process:
                yield i, start


@functools.lru_cache(maxsize=1024)
def _holders(sharding: jax.sharding.Sharding, shape: Shape) -> dict[Shape, tuple[int, ...]]:
    """Returns the processes that have a shard, by where it starts."""
    found: dict[Shape, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start = tuple(part.start or 0 for part in index)
        found.setdefault(start, set()).add(device.process_index)
    return {start: tuple(sorted(processes)) for start, processes in found.items()}


def _flat(item: Any) -> Iterator[tuple[int | None, tuple[tuple[int, str], ...], Any]]:
    """Yields position, path and value of each leaf; what is empty has no position."""
    position = 0
    for path, value in restored_kinds.flat_target(item)[0]:
        if restored_kinds.is_empty(value):
            yield None, restored_kinds.path_of(path), value
            continue
        yield position, restored_kinds.path_of(path), value
        position += 1


def _kind_of_empty(value: Any) -> str:
    if value is None:
        return "None"
    return "List" if isinstance(value, list | tuple) and not hasattr(value, "_fields") else "Dict"


def _kind_of(value: Any) -> tuple[str, str | None]:
    if isinstance(value, jax.Array):
        return ("key", str(jax.random.key_impl(value))) if is_key(value) else ("array", None)
    return _NUMBERS.get(type(value), "numpy"), None


def view_in(memory: np.ndarray, spot: Spot) -> np.ndarray:
    """Returns the bytes of a piece in the memory of a file."""
    return memory[spot.offset : spot.offset + spot.n_bytes]


def has_all_here(plan: Plan, process_index: int) -> bool:
    """Whether a plan is of all that this process has, and not of its share of it alone.

    Where processes share the writing of what each of them has, no process writes all of its own.
    The answer is kept with the plan.
    """
    if "tiers-all-here" not in plan.kept:
        plan.kept["tiers-all-here"] = _has_all_here(plan, process_index)
    return plan.kept["tiers-all-here"]


def _has_all_here(plan: Plan, process_index: int) -> bool:
    written = dict.fromkeys(range(len(plan.leaves)), 0)
    for slab in plan.slabs:
        for piece in slab.pieces:
            written[piece.leaf] += math.prod(piece.shape)
    return all(
        written[i] == _elements_here(leaf, process_index) for i, leaf in enumerate(plan.leaves)
    )


def _elements_here(leaf: Any, process_index: int) -> int:
    if leaf.sharding is None:
        return math.prod(leaf.shape)
    where = leaf.sharding.devices_indices_map(leaf.shape)
    mine = {
        tuple(part.start or 0 for part in index)
        for device, index in where.items()
        if device.process_index == process_index
    }
    return len(mine) * math.prod(leaf.sharding.shard_shape(leaf.shape))


def with_host_leaves(plan: Plan, process_index: int, *, slab_bytes: int) -> Plan:
    """Returns a plan by which each process keeps the leaves in host memory, as the first does.

    Args:
        plan: a plan of this process.
        process_index: this process.
        slab_bytes: most bytes of a slab.
    """
    hosts = [i for i, leaf in enumerate(plan.leaves) if leaf.sharding is None]
    if process_index == 0 or not hosts:
        return plan
    alone = make_plan(
        [plan.leaves[i] for i in hosts], ReplicaPolicy(), process_index=0, slab_bytes=slab_bytes
    )
    slabs = [
        dataclasses.replace(
            slab,
            leaves=tuple(hosts[i] for i in slab.leaves),
            pieces=tuple(_of_leaf(piece, hosts[piece.leaf]) for piece in slab.pieces),
        )
        for slab in alone.slabs
    ]
    return dataclasses.replace(plan, slabs=(*plan.slabs, *slabs), kept={})


def _of_leaf(piece: Piece, leaf: int) -> Piece:
    return dataclasses.replace(piece, leaf=leaf)
