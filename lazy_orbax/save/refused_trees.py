"""What cannot be saved is refused before anything is written: all of it at once, by key path."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax._orbax.records import Settings, TreeInfo
from lazy_orbax._paths import final
from lazy_orbax.errors import DeletedArrayError, OptionError, TreeError, summarize
from lazy_orbax.storage.places import place_of

_is_deleted = operator.methodcaller("is_deleted")


def refuse_deleted(item: Any, arrays: Sequence[jax.Array]) -> None:
    """Checks that no array of a tree was deleted.

    Raises:
        DeletedArrayError: some was.
    """
    if not any(map(_is_deleted, arrays)):
        return
    problems = [
        f"{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(item)
        if isinstance(leaf, jax.Array) and leaf.is_deleted()
    ]
    raise DeletedArrayError(
        "These arrays were deleted before save() was called, most likely donated to a jitted "
        f"function:{summarize(problems)}\nSave the state that the function returned."
    )


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        raise TreeError(f"{what}; nothing was written:{summarize(problems)}")


def refuse_unsupported(settings: Settings, keypaths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Checks that Orbax has a place for every leaf.

    Raises:
        TreeError: it has none for some.
    """
    problems = []
    for keypath, leaf in zip(keypaths, leaves, strict=True):
        type_ = type(leaf)
        if settings.type_handler_for(type_) is None:
            problems.append(
                f"{keypath}: {type_.__name__}: TypeHandler lookup failed for: type={type_}; "
                "convert it to an array, a number or a string, or register a type handler for it"
            )
        elif isinstance(leaf, jax.Array | np.ndarray) and leaf.size == 0:
            problems.append(
                f"{keypath}: {leaf.dtype}{list(leaf.shape)}: Orbax's format has no arrays of zero "
                "size; leave it out or save None"
            )
        elif isinstance(leaf, jax.Array):
            problems.extend(_unreachable(keypath, leaf))
    _refuse(problems, "These leaves cannot be saved")


def _unreachable(keypath: str, array: jax.Array) -> list[str]:
    if jax.process_count() > 1 and array.is_fully_addressable:
        return [
            f"{keypath}: {array.dtype}{list(array.shape)} is on process "
            f"{jax.process_index()} alone ({array.sharding}); with several processes make it a "
            "global array, or a NumPy array if every process has the same"
        ]
    if not array.sharding.addressable_devices:
        return [
            f"{keypath}: {array.dtype}{list(array.shape)} has no shard on process "
            f"{jax.process_index()} ({array.sharding}); reshard it over all processes first"
        ]
    return []


def refuse_relative(directory: str, *, uses_ocdbt: bool) -> None:
    """Checks that Orbax can write a tree to a directory: its OCDBT wants an absolute path.

    Args:
        directory: the item's directory; empty while Orbax does not tell it.
        uses_ocdbt: whether arrays are written to OCDBT.

    Raises:
        OptionError: the directory is relative.
    """
    if uses_ocdbt and directory and not place_of(directory).is_absolute:
        raise OptionError(
            f"{final(directory)}: the path of a checkpoint should be absolute. Nothing was "
            "written; save to os.path.abspath(...) of it."
        )


@contextlib.contextmanager
def refusing_deep_trees() -> Iterator[None]:
    """Says what Python and JAX mean, which walk trees recursively.

    Raises:
        TreeError: the tree has too many levels for them.
    """
    try:
        yield
    except (RecursionError, SystemError) as error:
        # Where a callback of Orbax's exceeds the limit, JAX has no better word for it.
        if isinstance(error, SystemError) and "exception set" not in str(error):
            raise
        raise TreeError(
            f"The tree has too many levels for Python's recursion limit of "
            f"{sys.getrecursionlimit()} (sys.setrecursionlimit). Nothing was written."
        ) from error


def refuse_clashes(keypaths: Sequence[str], tree: TreeInfo) -> None:
    """Checks that no two leaves are stored under one name.

    Raises:
        TreeError: some are.
    """
    by_name: dict[str, list[str]] = {}
    for keypath, info in zip(keypaths, tree.leaves, strict=True):
        by_name.setdefault(info.name, []).append(keypath)
    problems = [
        f"{' and '.join(paths)} are both stored as {name!r}; rename one"
        for name, paths in by_name.items()
        if len(paths) > 1
    ]
    _refuse(problems, "These leaves would overwrite each other")
