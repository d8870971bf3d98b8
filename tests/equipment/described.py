"""What a checkpoint and a restored tree are, as values to compare. Needs no lazy_orbax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from equipment.trees import all_bits


def description(metadata: Any) -> Any:
    """Returns item metadata as comparable values: tree structure, and all that a leaf says."""
    return (
        str(jax.tree.structure(metadata.tree)),
        [
            (jax.tree_util.keystr(path), _describe(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)
        ],
        metadata.custom_metadata,
    )


def _describe(leaf: Any) -> Any:
    if not dataclasses.is_dataclass(leaf):
        return repr(leaf)
    fields = {f.name: getattr(leaf, f.name, None) for f in dataclasses.fields(leaf)}
    fields.pop("directory", None)
    return type(leaf).__name__, {name: repr(value) for name, value in fields.items()}


def contents(tree: Any) -> list[tuple[str, str, Any]]:
    """Returns key path, type (with the sharding of arrays) and bits of every leaf."""
    found = []
    for (path, value), leaf in zip(all_bits(tree), jax.tree.leaves(tree), strict=True):
        array = isinstance(leaf, jax.Array)
        found.append((path, f"jax.Array {leaf.sharding}" if array else str(type(leaf)), value))
    return found
