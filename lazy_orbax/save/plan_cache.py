"""From a tree to its plan: looked up where the same tree was saved before, else made.

The second save of a tree costs a comparison of lists here, at C speed: a jitted step returns
arrays whose `aval` and `sharding` are the same objects every time.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from lazy_orbax._jax_context import neutral
from lazy_orbax._orbax import describe, on_disk
from lazy_orbax._orbax.records import Destination, LeafInfo, Settings
from lazy_orbax.errors import TreeError
from lazy_orbax.plan.shards import Leaf, ReplicaPolicy, is_key
from lazy_orbax.plan.slabs import Plan, make_plan
from lazy_orbax.save.disk_format import Format, make_format
from lazy_orbax.save.refused_trees import (
    refuse_clashes,
    refuse_deleted,
    refuse_unsupported,
    refusing_deep_trees,
)
from lazy_orbax.save.tree_identity import TreeIdentity, is_equal
from lazy_orbax.snapshot.step_copies import given_of, origins

# A plan may keep some megabytes of compiled programs.
_MOST_CACHED = 16
_HOST_TYPES = (np.ndarray, np.generic, int, float, bytes)
_aval = operator.attrgetter("aval")


@dataclasses.dataclass
class Prepared:
    """A plan, what it puts on disk, and which tree it is for.

    Attributes:
        plan: what is copied and written lazily.
        format: how that is stored.
        keys: positions of typed PRNG keys, whose data is what is stored.
        others: leaves that Orbax's own type handlers write, with their positions.
        positions: for every leaf of the plan, its position in the tree.
    """

    plan: Plan
    format: Format
    keys: tuple[int, ...]
    others: tuple[tuple[int, LeafInfo], ...]
    positions: tuple[int, ...]

    def arrays(self, leaves: Sequence[Any]) -> list[Any]:
        """Returns the values of the plan's leaves, of all leaves of a tree."""
        if not self.keys:
            return [leaves[i] for i in self.positions]
        keys = set(self.keys)
        with neutral():
            return [
                jax.random.key_data(leaves[i]) if i in keys else leaves[i] for i in self.positions
            ]

    def texts(self, leaves: Sequence[Any]) -> dict[str, str]:
        """Returns the leaves that are strings, by name. Orbax writes them."""
        others = ((leaf.name, leaves[i]) for i, leaf in self.others)
        return {name: value for name, value in others if isinstance(value, str)}


@dataclasses.dataclass(eq=False)
class _Signature:
    """What must be equal for a plan to serve again. The values of the leaves are not in it."""

    tree: TreeIdentity
    types: list[type]
    avals: list[Any]
    shardings: list[Any]
    hosts: list[tuple[Any, Any]]
    save_args: tuple[list[Any], Any] | None
    config: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        """Compares what tells most trees apart first, and the names last."""
        assert isinstance(other, _Signature)
        cheap = operator.attrgetter("types", "shardings", "hosts", "config")
        if cheap(self) != cheap(other) or not is_equal(self.save_args, other.save_args):
            return False
        # Most often they are the same objects, which is quick to see.
        if self.avals != other.avals and _shapes(self.avals) != _shapes(other.avals):
            return False
        return self.tree.is_same(other.tree)


def _shapes(avals: list[Any]) -> list[tuple[Any, ...]]:
    """What counts of avals: they also tell how an array came about."""
    return [(aval.shape, aval.dtype) for aval in avals]


class PlanCache:
    """Remembers the plans of the last few trees.

    Invariant, under the lock: `_entries` holds at most `_MOST_CACHED` pairs, last used last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: collections.deque[tuple[_Signature, Prepared]] = collections.deque(
            maxlen=_MOST_CACHED
        )

    def find(self, signature: _Signature) -> Prepared | None:
        """Returns the plan that was made for an equal signature."""
        with self._lock:
            for i in reversed(range(len(self._entries))):
                if self._entries[i][0] == signature:
                    _, prepared = self._entries[i]
                    del self._entries[i]
                    # The new signature has the newest objects: the next look is by identity.
                    signature.tree.settle()
                    self._entries.append((signature, prepared))
                    return prepared
        return None

    def add(self, signature: _Signature, prepared: Prepared) -> None:
        """Remembers a plan."""
        signature.tree.settle()
        with self._lock:
            self._entries.append((signature, prepared))

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()


PLAN_CACHE = PlanCache()
"""The plans of this process."""


@refusing_deep_trees()
def prepare(
    settings: Settings,
    item: Any,
    save_args: Any,
    *,
    destination: Destination,
    slab_bytes: int,
    abstract: bool,
) -> tuple[Prepared, list[Any]]:
    """Returns the plan for `item`, and its leaves.

    Args:
        settings: how the handler saves.
        item: the tree.
        save_args: what the caller wants of each leaf, or `None`.
        destination: where to.
        slab_bytes: most bytes of a slab.
        abstract: whether the arrays only stand for others, and may be deleted ones.

    Raises:
        TreeError: the tree cannot be saved; every reason is named with its key path.
        DeletedArrayError: some array was deleted or donated already.
    """
    leaves, treedef = jax.tree.flatten(item)
    if not leaves and not item:
        raise TreeError(
            "Found empty item: a tree with no leaves. Save at least one array or scalar."
        )
    types = list(map(type, leaves))
    kinds = set(types)
    array_types = _array_types(kinds)
    arrays = [leaf for leaf, type_ in zip(leaves, types, strict=True) if type_ in array_types]
    if not abstract:
        refuse_deleted(item, arrays)
    process = (jax.process_index(), jax.process_count())
    config = (settings, _type_handlers(settings, kinds), destination, slab_bytes, *process)
    signature = _Signature(
        TreeIdentity(item, treedef),
        types,
        list(map(_aval, arrays)),
        origins(arrays),
        _host_shapes(leaves, kinds - array_types),
        None if save_args is None else jax.tree.flatten(jax.tree.map(copy.copy, save_args)),
        config,
    )
    prepared = PLAN_CACHE.find(signature)
    if prepared is None:
        divide = functools.partial(
            make_plan, process_index=jax.process_index(), slab_bytes=slab_bytes
        )
        prepared = make_prepared(settings, item, save_args, destination, divide)
        PLAN_CACHE.add(signature, prepared)
    return prepared, leaves


def _host_shapes(leaves: Sequence[Any], kinds: set[type]) -> list[tuple[Any, Any]]:
    """Returns dtype and shape of the leaves of these types that are NumPy arrays or numbers."""
    numeric = tuple(kind for kind in kinds if issubclass(kind, _HOST_TYPES))
    if not numeric:
        return []
    hosts = [np.asarray(leaf) for leaf in leaves if isinstance(leaf, numeric)]
    return [(host.dtype, host.shape) for host in hosts]


def _array_types(types: set[type]) -> set[type]:
    if any(issubclass(type_, jax.core.Tracer) for type_ in types):
        raise TreeError(
            "save() was called with traced values, inside jit or grad. Call it outside."
        )
    return {type_ for type_ in types if issubclass(type_, jax.Array)}


def _type_handlers(settings: Settings, types: set[type]) -> frozenset[tuple[type, Any]]:
    return frozenset((type_, settings.type_handler_for(type_)) for type_ in types)


def make_prepared(
    settings: Settings,
    item: Any,
    save_args: Any,
    destination: Destination,
    divide: Callable[[Sequence[Leaf], ReplicaPolicy], Plan],
) -> Prepared:
    """Plans the first save of a tree.

    Args:
        settings: how the handler saves.
        item: the tree.
        save_args: what the caller wants of each leaf, or `None`.
        destination: where to.
        divide: makes the plan of the leaves that have one.

    Raises:
        TreeError: the tree cannot be saved; every reason is named with its key path.
    """
    with_paths = jax.tree_util.tree_leaves_with_path(item)
    keypaths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    refuse_unsupported(settings, keypaths, leaves)
    tree = describe.describe_tree(settings, item, save_args, destination)
    refuse_clashes(keypaths, tree)
    planned, others, key_metadata = [], [], {}
    for position, (value, keypath) in enumerate(zip(leaves, keypaths, strict=True)):
        info = tree.leaves[position]
        if info.info.skip_deserialize:  # A placeholder: it has a name and no data.
            continue
        if info.route == "other":
            others.append((position, info))
            continue
        given = given_of(value)
        if isinstance(value, jax.Array) and is_key(value):
            key_metadata[position] = on_disk.key_metadata(value)
            with neutral():
                value = jax.random.key_data(value)
        sharding = value.sharding if isinstance(value, jax.Array) else None
        if given is not None:  # Stored as the original would be.
            sharding = given.sharding
        stored = value if isinstance(value, jax.Array) else np.asarray(value)
        shape = tuple(stored.shape)
        names = (position, info.name, keypath)
        dtype = stored.dtype.newbyteorder("=")
        planned.append(Leaf(*names, shape, dtype, sharding, is_given=given is not None))
    arrays = [leaf.position for leaf in planned if leaf.sharding is not None]
    policy = describe.replica_policy(tree.leaves[arrays[0]].type_handler if arrays else None)
    plan = divide(planned, policy)
    format_ = make_format(settings, tree, plan, key_metadata)
    positions = tuple(leaf.position for leaf in planned)
    return Prepared(plan, format_, tuple(key_metadata), tuple(others), positions)
