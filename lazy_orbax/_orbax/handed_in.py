"""What Orbax hands in and takes back, in the forms it may have. Only public Orbax here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from lazy_orbax import _paths
from lazy_orbax._orbax.records import LeafInfo, Settings
from lazy_orbax._orbax.symbols import ocp


def path_of(directory: Any) -> str:
    """Returns a directory's path, also while Orbax only promises to create it."""
    try:
        return str(getattr(directory, "path", directory))
    except ValueError:  # A deferred path has no name before it exists.
        return ""


def without_dots(directory: Any) -> Any:
    """Returns a directory without `..` in its path, which Orbax takes as text: see `_paths`."""
    path = _paths.without_dots(str(directory))
    return directory if path == str(directory) else epath.Path(path)


async def created(directory: Any) -> Any:
    """Waits until a directory exists that Orbax may only have promised."""
    if hasattr(directory, "await_creation"):
        return await directory.await_creation()
    return directory


def save_args(args: Any) -> Any:
    """Returns the stock PyTree handler's arguments of the same fields."""
    fields = ("item", "save_args", "ocdbt_target_data_file_size", "custom_metadata")
    return ocp.args.PyTreeSave(**{name: getattr(args, name) for name in fields})


def restore_args(args: Any) -> Any:
    """Returns the stock PyTree handler's arguments of the same fields."""
    fields = ("item", "restore_args", "partial_restore")
    return ocp.args.PyTreeRestore(**{name: getattr(args, name) for name in fields})


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns every leaf of a tree, and every empty node, by its name in a checkpoint."""
    names = ocp.tree.get_param_names(tree)
    leaves = jax.tree.structure(names).flatten_up_to(tree)
    return dict(zip(jax.tree.leaves(names), leaves, strict=True))


async def serialize_others(
    settings: Settings,
    others: Sequence[tuple[int, LeafInfo]],
    values: Sequence[Any],
    directory: Any,
) -> list[Any]:
    """Lets type handlers write the leaves that are theirs alone. Returns their futures.

    Args:
        settings: how the handler saves that saves now: the plan may be another's.
        others: positions and descriptions of those leaves.
        values: all leaves of the tree.
        directory: the item's directory, or Orbax's promise of it.
    """
    if not others:
        return []
    by_handler: dict[Any, list[tuple[int, LeafInfo]]] = {}
    for position, leaf in others:
        type_handler = settings.type_handler_for(type(values[position]))
        by_handler.setdefault(type_handler, []).append((position, leaf))
    use_ocdbt = others[0][1].info.is_ocdbt_checkpoint
    context = ocp.type_handlers.get_ts_context(use_ocdbt=use_ocdbt)
    futures = []
    for type_handler, members in by_handler.items():
        infos = [
            leaf.info.replace(parent_dir=directory, path=directory / leaf.name, ts_context=context)
            for _, leaf in members
        ]
        mine = [values[position] for position, _ in members]
        arguments = [leaf.save_args for _, leaf in members]
        futures += await type_handler.serialize(mine, infos, arguments)
    return futures
