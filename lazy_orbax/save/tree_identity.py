"""Whether two trees mean the same on disk, whatever their leaves are.

Python's `==` does not say so: `{1: x}` equals `{True: x}`, which is stored under another name, and
what trees keep beside their leaves may be arrays, or refuse to be compared at all.
"""

from __future__ import annotations

import operator
from typing import Any

import jax

# Of these types, and no subclass of them, what is equal is the same.
_EXACT = frozenset({str, int, bool, bytes, type(None)})
# Each for one kind of JAX's keys.
_KEY_FIELDS = ("key", "idx", "name")


class TreeIdentity:
    """The nodes of a tree: their types, and the names that they give to what is below them.

    Two of them are compared by their objects first: a jitted step returns trees of the same keys
    every time. Only where that does not tell are the names made, at some milliseconds.
    """

    def __init__(self, item: Any, treedef: Any):
        self._treedef, self._nodes = treedef, _nodes(treedef)
        self._item: Any = item
        self._meaning: Any = None

    def is_same(self, other: TreeIdentity) -> bool:
        """Whether the other tree has the same nodes and names."""
        if is_equal(self._treedef, other._treedef) and _are_same(self._nodes, other._nodes):
            self._meaning = other._meaning = self._meaning or other._meaning
            return True
        return self._names() == other._names()

    def settle(self) -> None:
        """Lets go of the tree, whose leaves may be large, before this is kept."""
        self._names()
        self._item = None

    def _names(self) -> Any:
        if self._meaning is None:
            self._meaning = _meaning(self._item, self._treedef)
        return self._meaning


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal; those that cannot be compared are not."""
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - What a user's own `==` may raise is of no interest.
        return False


def _nodes(treedef: Any) -> list[Any]:
    """Returns type and keys, or static fields, of every node that is no leaf."""
    found, pending = [], [treedef]
    while pending:
        node = pending.pop()
        if (data := node.node_data()) is not None:
            found.append(data)
            pending += node.children()
    return found


def _are_same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or mean the same beyond doubt."""
    if one is other:
        return True
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is list or kind is tuple:
        same = len(one) == len(other)
        return same and (all(map(operator.is_, one, other)) or all(map(_are_same, one, other)))
    return kind in _EXACT and one == other


def _meaning(item: Any, treedef: Any) -> tuple[list[Any], list[Any]]:
    """Returns the type and the size of each node, and the names on the way to what holds nothing.

    An empty container has a name on disk as a leaf has.
    """
    shape, pending = [], [treedef]
    while pending:
        node = pending.pop()
        data, inner = node.node_data(), node.children()
        shape.append((data and data[0], node.num_leaves, len(inner)))
        pending += inner
    has_nothing = lambda node: not jax.tree.structure(node).children()  # noqa: E731
    paths, _ = jax.tree_util.tree_flatten_with_path(item, is_leaf=has_nothing)
    # Below one node all paths share its key.
    keys = {id(key): key for path, _ in paths for key in path}
    names = {known: _name(key) for known, key in keys.items()}
    return shape, [[names[id(key)] for key in path] for path, _ in paths]


def _name(key: Any) -> tuple[type, str, str]:
    """Returns how Orbax and how JAX writes a key."""
    fields = [getattr(key, field) for field in _KEY_FIELDS if hasattr(key, field)]
    return type(key), str(fields[0] if fields else key), str(key)
