"""The leaf handlers of Orbax v1, as the type handlers of v0 that are inside them.

v1 makes new ones for each save. Those that do the same are one object here, or are equal, so that
the plan of the save before serves again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax.symbols import ocp
from lazy_orbax._orbax.v1 import V1

_MOST_KNOWN = 64
_known: dict[Any, Any] = {}


class OtherLeaf:
    """A leaf handler that somebody else wrote: it alone knows how to save its leaves.

    It is equal to others of its type, which save as it does. Which of them is asked is looked up
    for each save.
    """

    def __init__(self, compatible: Any):
        self._compatible = compatible
        self._type = type(getattr(compatible, "_leaf_handler", compatible))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compatible, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OtherLeaf) and self._type is other._type

    def __hash__(self) -> int:
        return hash(self._type)


class TypeHandlers:
    """A registry of v1's type handlers, with those of v0 in the place of what holds them."""

    def __init__(self, registry: Any):
        self._registry = registry

    def has(self, type_: Any) -> bool:
        """Whether there is one for a type, or the name of a type."""
        return self._registry.has(type_)

    def get(self, type_: Any) -> Any:
        """Returns the one for a type, or the name of a type.

        Raises:
            ValueError: there is none.
        """
        return _of_v0(self._registry.get(type_))


def _of_v0(handler: Any) -> Any:
    if not isinstance(handler, V1["compatible"]):
        return handler
    leaf = handler._leaf_handler
    if type(leaf) is V1["strings"]:
        return _strings()
    inner = getattr(leaf, "_handler_impl", None)
    of_stock = [V1[name] for name in ("arrays", "numpy", "scalars") if isinstance(leaf, V1[name])]
    # Of a class that somebody made of one of them, unless it saves or reads in a way of its own.
    same = ("serialize", "deserialize")
    for stock in of_stock:
        if all(getattr(type(leaf), name) is getattr(stock, name) for name in same):
            return _one_of(inner)
    return OtherLeaf(handler)


@functools.cache
def _strings() -> Any:
    """Returns a type handler that writes the file which v1 writes."""
    return ocp.type_handlers.StringHandler()


def _one_of(handler: Any) -> Any:
    """Returns the first type handler that does what this one does."""
    if len(_known) > _MOST_KNOWN:
        _known.clear()
    return _known.setdefault(_value_of(handler), handler)


def _value_of(thing: Any) -> Any:
    """Returns what is equal for two type handlers, or parts of them, that do the same."""
    if thing is None or isinstance(thing, bool | int | float | str | type):
        return thing
    if not type(thing).__module__.startswith("orbax.") or not hasattr(thing, "__dict__"):
        return (type(thing), () if thing == {} else id(thing))
    return type(thing), tuple((name, _value_of(value)) for name, value in vars(thing).items())


def restore_args_in_v0(args: Any, *, strict: bool) -> Any:
    """Returns the arguments of a restore with what v1 wants of arrays said as in v0.

    Args:
        args: of v1, whose `RestoreArgs` have the leaves of the target beside them.
        strict: whether shapes must be those that are stored.
    """
    if args.restore_args is None:
        return args
    in_v0 = functools.partial(_restore_arg_in_v0, strict=strict)
    return dataclasses.replace(args, restore_args=jax.tree.map(in_v0, args.restore_args))


def _restore_arg_in_v0(argument: Any, *, strict: bool) -> Any:
    leaf = getattr(argument, "abstract_leaf", None)
    if leaf is not None and argument.restore_type is None:
        # The handler of what is stored is given it: a number becomes a string, say.
        return ocp.RestoreArgs(restore_type=type(leaf))
    if leaf is None or isinstance(leaf, type):  # As it is stored.
        return argument
    if argument.restore_type is np.ndarray:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    if argument.restore_type is jax.Array and isinstance(leaf.sharding, jax.sharding.Sharding):
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            dtype=leaf.dtype,
            sharding=leaf.sharding,
            global_shape=leaf.shape,
            strict=strict,
        )
    return argument
