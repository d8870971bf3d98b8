"""Whether this machine can hold what a checkpoint declares, or a target says so much is wanted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lazy_orbax._machine import memory_bytes
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.trust.files import brief
from lazy_orbax.trust.zarr_arrays import Declared

# A chunk may be missing where it equals the fill value, but most are stored.
_CHUNKS_PER_KEY = 16
_FEW_CHUNKS = 2**18
# What compression may add to a chunk that does not compress.
_INCOMPRESSIBLE = 1.02
_CHUNK_OVERHEAD_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What the arrays of a checkpoint declare, by the name they are stored under.

    Attributes:
        declared: their sizes.
        stored: how many files or keys there are; `None` where nobody counted.
        longest_value: the longest stored chunk and its bytes.
    """

    declared: dict[str, Declared]
    stored: int | None
    longest_value: tuple[str, int]


def _wanted(names: set[str], args: Any) -> tuple[set[str], dict[str, int]]:
    """Returns the arrays that will be restored, and how many elements a target gives each."""
    item, restore_args = getattr(args, "item", None), getattr(args, "restore_args", None)
    if item is None or getattr(args, "transforms", None) is not None:
        return names, {}
    leaves = _with_path(item)
    if getattr(args, "partial_restore", False):
        in_item = {_name(path) for path, leaf in leaves if leaf is not ...}
    else:
        in_item = names - {_name(path) for path, leaf in leaves if leaf is ...}
    given = {
        _name(path): math.prod(leaf.global_shape)
        for path, leaf in _with_path(restore_args)
        if getattr(leaf, "global_shape", None) is not None
    }
    return names & in_item, given


def _with_path(tree: Any) -> list[tuple[Any, Any]]:
    import jax  # Only who has a target has JAX: whoever looks at a checkpoint need not wait for it.

    return jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: hasattr(leaf, "restore_type")
    )


def _name(path: Any) -> str:
    """Returns the name under which Orbax stores a leaf."""
    return ".".join([str(_text(key)) for key in path])


def _text(key: Any) -> Any:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return getattr(key, name)
    return key


def refuse_oversize(directory: Any, arrays: Arrays, names: set[str], args: Any) -> None:
    """Checks that what will be allocated fits this machine, or is what the caller expects.

    Args:
        directory: the item's directory, for errors.
        arrays: what its arrays declare.
        names: those that may be restored.
        args: what was asked for; `None` is no array as a whole.

    Raises:
        MalformedCheckpointError: it is too much.
    """
    restored, given = _wanted(names, args)
    if args is not None:  # For metadata and digests, no array is allocated as a whole.
        _refuse_oversize(directory, arrays, restored - given.keys())
    _refuse_odd_chunks(directory, arrays, restored, given)


def _refuse_oversize(directory: Any, arrays: Arrays, names: set[str]) -> None:
    """Checks that arrays of which only the checkpoint says how large they are fit this machine."""
    import jax

    available_bytes = (memory_bytes() + _device_bytes()) * jax.process_count()
    sizes = {name: arrays.declared[name].total_bytes for name in names}
    if sum(sizes.values()) > available_bytes:
        name = max(sizes, key=lambda name: sizes[name])
        raise MalformedCheckpointError(
            directory,
            f"arrays that declare {sum(sizes.values())} bytes, the largest being {brief(name)} "
            f"with shape {brief(list(arrays.declared[name].shape))}",
            f"at most the {available_bytes} bytes of memory here, or a target (an abstract tree "
            "with these shapes) that says so much is wanted",
        )


def _refuse_odd_chunks(
    directory: Any, arrays: Arrays, restored: set[str], given: dict[str, int]
) -> None:
    """Checks that no chunk and no number of chunks is out of proportion."""
    host_bytes = memory_bytes()
    sizes = {name: arrays.declared[name] for name in restored}
    for name, size in sizes.items():
        if size.chunk_bytes > host_bytes:
            raise MalformedCheckpointError(
                f"{directory}, leaf {brief(name)}",
                f"a chunk of {size.chunk_bytes} bytes",
                f"at most the {host_bytes} bytes of memory here",
            )
    name, stored_bytes = arrays.longest_value
    longest_bytes = max((size.chunk_bytes for size in arrays.declared.values()), default=0)
    longest_bytes = min(longest_bytes, host_bytes)
    most_bytes = math.ceil(longest_bytes * _INCOMPRESSIBLE) + _CHUNK_OVERHEAD_BYTES
    if stored_bytes > most_bytes:
        raise MalformedCheckpointError(
            f"{directory}, chunk {brief(name)}",
            f"{stored_bytes} bytes",
            f"at most {most_bytes}: the longest chunk declared has {longest_bytes}",
        )
    # Of what a target bounds, no more chunks are read than it has elements.
    chunks = sum(min(size.chunks, given.get(name, size.chunks)) for name, size in sizes.items())
    if arrays.stored is not None and chunks > max(_FEW_CHUNKS, _CHUNKS_PER_KEY * arrays.stored):
        raise MalformedCheckpointError(
            directory, f"{chunks} chunks declared and {arrays.stored} stored", "most of them stored"
        )


def _device_bytes() -> int:
    """Returns the memory of this process's devices, where it is not the host's."""
    import jax

    stats = [d.memory_stats() for d in jax.local_devices() if d.platform != "cpu"]
    return sum((one or {}).get("bytes_limit", 0) for one in stats)
