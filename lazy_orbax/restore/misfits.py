"""What of a restore target does not fit the checkpoint: an error says it leaf by leaf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from lazy_orbax._jax_context import neutral
from lazy_orbax._orbax import restored_kinds, symbols
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import LazyOrbaxError, RestoreError, summarize
from lazy_orbax.restore.wanted import MisfitError


@contextlib.contextmanager
def explained(metadata: Callable[[Any], Any], directory: Any, args: Any) -> Iterator[None]:
    """Turns a misfit between target and checkpoint into a `RestoreError`.

    Args:
        metadata: returns what Orbax says of what is in a directory.
        directory: the item's directory.
        args: what was asked for, or `None`.

    Raises:
        RestoreError: leaves of the target have another shape than what is stored, or the trees
            differ.
    """
    try:
        yield
    except Exception as error:
        if not _may_be_a_misfit(error):
            raise
        differs = any(words in str(error) for words in symbols.MISFITS)
        misfits = _misfits(metadata, directory, args, differs=differs)
        if misfits:
            orbax = "" if isinstance(error, MisfitError) else f"\nOrbax says: {error}"
            raise RestoreError(
                f"The restore target does not fit the checkpoint {directory}:"
                f"{summarize(misfits)}{orbax}"
            ) from error
        if differs:
            raise RestoreError(f"{error}\nThe checkpoint is {directory}.") from error
        raise


def _may_be_a_misfit(error: Exception) -> bool:
    """Whether who catches an error by its built-in class would catch a `RestoreError` too."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    is_other = isinstance(error, LazyOrbaxError) and not isinstance(error, MisfitError)
    return issubclass(RestoreError, kind) and not is_other


def _misfits(
    metadata: Callable[[Any], Any], directory: Any, args: Any, *, differs: bool
) -> list[str]:
    """Names leaves of another shape than what is stored; where trees differ, what one alone has."""
    restore_args = getattr(args, "restore_args", None)
    target = restore_args if getattr(args, "item", None) is None else args.item
    if target is None:
        return []
    try:
        tree = metadata(directory).tree
    except Exception:  # noqa: BLE001 - A broken checkpoint: what restoring said of it is raised.
        return []
    stored = {_names(path): (path, leaf) for path, leaf in tree_leaves_with_path(tree)}
    given = tree_leaves_with_path(restore_args)
    arguments = {_names(path): argument for path, argument in given}
    problems = []
    for path, leaf in tree_leaves_with_path(target):
        name = keystr(path)
        if differs and _names(path) not in stored:
            problems.append(f"{name}: {_what_is_there(stored, _names(path))}")
        _, entry = stored.pop(_names(path), (None, None))
        shape = restored_kinds.stored_shape(entry)
        if problem := _problem(arguments.get(_names(path)), leaf, shape):
            problems.append(f"{name}: {problem}")
    if differs and not getattr(args, "partial_restore", False):
        problems += [
            f"{keystr(path)}: the target lacks this leaf of the checkpoint; add it, or restore a "
            "part with lazy_orbax.load(path, target)"
            for path, _ in stored.values()
        ]
    return problems


def _what_is_there(stored: dict[tuple[str, ...], Any], leaf: tuple[str, ...]) -> str:
    """Says what the checkpoint has in place of a leaf of the target, which then counts as named."""
    below = [path for path in stored if path[: len(leaf)] == leaf]
    for path in below:
        del stored[path]
    if not below:
        return "the checkpoint has no such leaf; take it out of the target"
    named = ", ".join(".".join(path) for path in below[:3]) + (", ..." if below[3:] else "")
    return f"found a tree, wanted a leaf; give the target each leaf of it: {named}"


def _problem(argument: Any, leaf: Any, found: Any) -> str | None:
    """Says what is wrong with what is wanted of an array of a shape, if something is."""
    kind = getattr(argument, "restore_type", None)
    if found and isinstance(kind, type) and issubclass(kind, int | float | np.number):
        return f"found an array of shape {list(found)}, wanted a number; give it an array"
    wanted = _shape_wanted(argument, leaf)
    if found is None or wanted is None or tuple(found) == tuple(wanted):
        return None
    text = f"found {list(found)}, wanted {list(wanted)}, which is not compatible with the stored "
    if len(found) != len(wanted):  # Such a one is not cut either.
        return f"{text}shape; give that"
    cuts = "strict=False (v1: enable_padding_and_truncation) to cut or pad"
    return f"{text}shape; give that, or {cuts}" if argument.strict else None


def _shape_wanted(argument: Any, leaf: Any) -> Any:
    """Returns the shape that is wanted of what is stored; `None` where Orbax takes any."""
    if not isinstance(argument, ocp.ArrayRestoreArgs):
        return None
    shape, dtype = restored_kinds.completed(argument, leaf).global_shape, argument.dtype
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return shape
    with neutral():  # The data of keys is what is stored.
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype)).shape


def _names(path: Any) -> tuple[str, ...]:
    """Returns a key path as the names that Orbax stores, whatever the containers are."""
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
