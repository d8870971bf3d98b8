"""Restore is Orbax's own; only its complaints are put so that they name the leaf."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lazy_orbax.errors import RestoreError, summarize


@contextlib.contextmanager
def explained(handler: Any, directory: Any, args: Any) -> Iterator[None]:
    """Turns a misfit between target and checkpoint into a `RestoreError`.

    Args:
        handler: the handler that restores, for its `metadata`.
        directory: the item's directory.
        args: what was asked for, or `None`.

    Raises:
        RestoreError: leaves of the target have another shape than what is stored, or the trees
            differ.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        misfits = _misfits(handler, directory, getattr(args, "item", None))
        if misfits:
            raise RestoreError(
                f"The restore target does not fit the checkpoint {directory}:{summarize(misfits)}"
            ) from error
        if "do not match" in str(error):
            raise RestoreError(f"{error}\nThe checkpoint is {directory}.") from error
        raise


def _misfits(handler: Any, directory: Any, target: Any) -> list[str]:
    """Names the leaves whose shape differs from what is stored."""
    if target is None:
        return []
    try:
        metadata = handler.metadata(directory).tree
    except Exception:  # noqa: BLE001 - A broken checkpoint: what restoring said of it is raised.
        return []
    stored = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(metadata)}
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(target):
        found, wanted = (
            getattr(stored.get(_names(path)), "shape", None),
            getattr(leaf, "shape", None),
        )
        if found is None or wanted is None or tuple(found) == tuple(wanted):
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue  # Stored as its data, which has one dimension more.
        problems.append(
            f"{jax.tree_util.keystr(path)}: found {list(found)}, wanted {list(wanted)}; give the "
            "stored shape, or strict=False to cut or pad"
        )
    return problems


def _names(path: Any) -> tuple[str, ...]:
    """Returns a key path as the names that Orbax stores, whatever the containers are."""
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
