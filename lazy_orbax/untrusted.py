"""A checkpoint is data from somewhere: checked before Orbax and TensorStore act on what it says.

Refused is what would take memory without bound, hang, crash, or read outside the directory. What is
merely wrong (missing arrays, checksums, shapes that do not fit the target) is found by Orbax.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import tensorstore as ts
from etils import epath

from lazy_orbax import _orbax, metadata_checks, ocdbt_checks, zarr_checks
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.file_checks import Files, brief, read_small, survey
from lazy_orbax.object_store import scheme_of
from lazy_orbax.options import memory_bytes

# Parsed JSON takes up to 25 times its text: this is a tenth of memory. `_METADATA` has about 220
# bytes a leaf, and 16 MiB are 76,000 leaves.
_LEAST_JSON_BYTES = 16 * 2**20
_JSON_SHARE = 256
# Small arrays are in the file of older checkpoints itself.
_AGGREGATE_SHARE = 8
# A chunk may be missing where it equals the fill value, but most are stored.
_CHUNKS_PER_KEY = 16
_FEW_CHUNKS = 2**18
# What compression may add to a chunk that does not compress.
_INCOMPRESSIBLE = 1.02
_CHUNK_OVERHEAD_BYTES = 2**16

_ZARR_NAMES = frozenset({".zarray", "zarr.json"})
_AGGREGATE_FILE = "checkpoint"

# The directory that a face has checked already, while it restores through the handler inside.
_CHECKED: contextvars.ContextVar[str] = contextvars.ContextVar("lazy_orbax_checked", default="")


@contextlib.contextmanager
def checked(directory: Any, args: Any, aggregate: str | None = None) -> Iterator[None]:
    """Refuses a malformed checkpoint once, whatever is nested within.

    Args:
        directory: the item's directory.
        args: what is to be restored; `None` for metadata alone.
        aggregate: the file in which older checkpoints keep small arrays, if not `checkpoint`.

    Raises:
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
    """
    if _CHECKED.get() == str(directory):
        yield
        return
    refuse_malformed(directory, args, aggregate or _AGGREGATE_FILE)
    token = _CHECKED.set(str(directory))
    try:
        yield
    except Exception as error:
        if str(directory) not in str(error):
            error.add_note(f"This was while reading the checkpoint {directory}.")
        raise
    finally:
        _CHECKED.reset(token)


def refuse_malformed(directory: Any, args: Any, aggregate: str) -> None:
    """Checks the files of an item, what they declare, and whether this machine could hold it.

    Args:
        directory: the item's directory, local or `gs://`. Where there is none, nothing is checked.
        args: what is to be restored; `None` for metadata alone.
        aggregate: the file in which older checkpoints keep small arrays.

    Raises:
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote, or is too large for this
            machine and no target says that so much is wanted.
    """
    directory, files = epath.Path(directory), None
    if not scheme_of(str(directory)):
        if not directory.is_dir():
            return
        files = survey(str(directory), _ZARR_NAMES)
    limit_bytes = max(_LEAST_JSON_BYTES, memory_bytes() // _JSON_SHARE)
    read_small_size(directory, aggregate, memory_bytes() // _AGGREGATE_SHARE)
    tree = _check_json(directory, limit_bytes, args)
    arrays = _declared(directory, files, tree)
    if args is not None:
        _refuse_oversize(directory, arrays, _wanted(tree, arrays.declared, args))


def read_small_size(directory: epath.Path, name: str, limit_bytes: int) -> None:
    """Checks that a file, if there is one, is not larger than `limit_bytes`.

    Raises:
        MalformedCheckpointError: it is.
    """
    path = directory / name
    if path.exists() and (found := path.stat().length) > limit_bytes:
        raise MalformedCheckpointError(path, f"{found} bytes", f"at most {limit_bytes}")


def _check_json(directory: epath.Path, limit_bytes: int, args: Any) -> metadata_checks.Tree | None:
    """Checks those of Orbax's JSON files that will be read."""

    def content(name: str) -> bytes | None:
        return read_small(directory, name, limit_bytes)

    tree = None
    if (found := content(metadata_checks.TREE_FILE)) is not None:
        path = directory / metadata_checks.TREE_FILE
        tree = metadata_checks.check_tree(found, path)
    if _needs_shardings(args) and (found := content(metadata_checks.SHARDING_FILE)) is not None:
        metadata_checks.check_shardings(found, directory / metadata_checks.SHARDING_FILE)
    for path in (directory / metadata_checks.ARRAY_METADATAS).glob("process_*"):
        name = f"{metadata_checks.ARRAY_METADATAS}/{path.name}"
        if (found := content(name)) is not None:
            metadata_checks.check_array_metadatas(found, path)
    strings = [name for name, kind in (tree.leaves if tree else {}).items() if kind == "string"]
    if strings and (found := content(metadata_checks.STRINGS_FILE)) is not None:
        path = directory / metadata_checks.STRINGS_FILE
        metadata_checks.check_strings(found, path, strings)
    return tree


def _needs_shardings(args: Any) -> bool:
    """Whether Orbax will read `_sharding`: for metadata, and for what has no target."""
    is_leaf = lambda leaf: hasattr(leaf, "restore_type")  # noqa: E731
    leaves = jax.tree.leaves(getattr(args, "restore_args", None), is_leaf=is_leaf)
    return not leaves or any(
        getattr(leaf, "sharding", None) is None and getattr(leaf, "mesh", None) is None
        for leaf in leaves
    )


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """What the arrays of a checkpoint declare, by the name they are stored under.

    Attributes:
        declared: their sizes.
        stored: how many files or keys there are; `None` where nobody counted.
        longest_value: the longest stored chunk and its bytes.
    """

    declared: dict[str, zarr_checks.Declared]
    stored: int | None
    longest_value: tuple[str, int]


def _declared(
    directory: epath.Path, files: Files | None, tree: metadata_checks.Tree | None
) -> _Arrays:
    spec = _orbax.directory_kvstore_spec(str(directory))
    base = ts.KvStore.open({**spec, "path": f"{spec['path'].rstrip('/')}/"}).result()
    # Orbax goes by `_METADATA`, and by the manifest where that does not say.
    if tree is None or tree.use_ocdbt is not False:
        suffixes = tuple(f"/{name}" for name in _ZARR_NAMES)
        database = ocdbt_checks.contents(directory, base, suffixes)
        if database is not None:
            where = directory / ocdbt_checks.MANIFEST
            found = {
                key.rpartition("/")[0]: zarr_checks.declared(value, f"{where}, key {brief(key)}")
                for key, value in database.metadata.items()
            }
            return _Arrays(found, database.keys, database.longest_value)
    if tree is not None:
        _refuse_paths(directory, tree)
    if files is not None:
        names = [name for name in files.names if name.rpartition("/")[2] in _ZARR_NAMES]
    else:
        leaves = tree.leaves if tree else {}
        names = [f"{leaf}/{name}" for leaf in leaves for name in _ZARR_NAMES]
    found = {
        name.rpartition("/")[0]: zarr_checks.declared(content, directory / name)
        for name, content in _contents(directory, base, names, files is not None)
    }
    count, longest = (files.count, files.longest_chunk) if files else (None, ("", 0))
    return _Arrays(found, count, longest)


def _contents(
    directory: epath.Path, base: ts.KvStore, names: Iterable[str], is_local: bool
) -> Iterator[tuple[str, bytes]]:
    """Yields what there is of some small files: one after the other, or all requests at once."""
    if is_local:
        for name in names:
            if (
                content := read_small(directory, name, zarr_checks.MOST_METADATA_BYTES)
            ) is not None:
                yield name, content
        return
    reads = [(name, base.read(name)) for name in names]
    for name, read in reads:
        if (result := read.result()).state == "value":
            yield name, bytes(result.value)


def _refuse_paths(directory: epath.Path, tree: metadata_checks.Tree) -> None:
    """In plain Zarr a name is a path."""
    problems = [
        f"leaf {brief(name)}: found a path out of the directory, wanted one within"
        for name in tree.leaves
        if name.startswith("/") or "\0" in name or ".." in name.split("/")
    ]
    if problems:
        raise MalformedCheckpointError.of(directory / metadata_checks.TREE_FILE, problems)


def _wanted(
    tree: metadata_checks.Tree | None, declared: dict[str, zarr_checks.Declared], args: Any
) -> tuple[set[str], set[str]]:
    """Returns the arrays that will be restored, and those of them whose size a target gives."""
    item, restore_args = getattr(args, "item", None), getattr(args, "restore_args", None)
    names = set(declared if tree is None else declared.keys() & tree.leaves.keys())
    if item is None or getattr(args, "transforms", None) is not None:
        return names, set()
    in_item = {_name(path) for path, leaf in _with_path(item) if leaf is not ...}
    if not getattr(args, "partial_restore", False):
        in_item = names - {_name(path) for path, leaf in _with_path(item) if leaf is ...}
    given = {
        _name(path)
        for path, leaf in _with_path(restore_args)
        if getattr(leaf, "global_shape", None) is not None
    }
    return names & in_item, names & in_item & given


def _with_path(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: hasattr(leaf, "restore_type")
    )


def _name(path: Any) -> str:
    """Returns the name under which Orbax stores a leaf."""
    return ".".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def _refuse_oversize(
    directory: epath.Path, arrays: _Arrays, wanted: tuple[set[str], set[str]]
) -> None:
    """Checks that what will be allocated fits this machine, or is what the caller expects."""
    restored, given = wanted
    host_bytes = memory_bytes()
    available_bytes = (host_bytes + _device_bytes()) * jax.process_count()
    sizes = {name: arrays.declared[name] for name in restored}
    total_bytes = sum(size.total_bytes for name, size in sizes.items() if name not in given)
    if total_bytes > available_bytes:
        name = max(sizes.keys() - given, key=lambda name: sizes[name].total_bytes)
        raise MalformedCheckpointError(
            directory,
            f"arrays that declare {total_bytes} bytes, the largest being {brief(name)} with shape "
            f"{brief(list(sizes[name].shape))}",
            f"at most the {available_bytes} bytes of memory here, or a target (an abstract tree "
            "with these shapes) that says so much is wanted",
        )
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
    chunks = sum(size.chunks for size in sizes.values())
    if arrays.stored is not None and chunks > max(_FEW_CHUNKS, _CHUNKS_PER_KEY * arrays.stored):
        raise MalformedCheckpointError(
            directory, f"{chunks} chunks declared and {arrays.stored} stored", "most of them stored"
        )


def _device_bytes() -> int:
    """Returns the memory of this process's devices, where it is not the host's."""
    stats = [d.memory_stats() for d in jax.local_devices() if d.platform != "cpu"]
    return sum((one or {}).get("bytes_limit", 0) for one in stats)
