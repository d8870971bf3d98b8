"""A checkpoint is data from somewhere: checked before Orbax and TensorStore act on what it says.

Refused is what would take memory without bound, hang, crash, or read outside the directory. What is
merely wrong (missing arrays, checksums, shapes that do not fit the target) is found by Orbax.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from lazy_orbax import _paths
from lazy_orbax._machine import memory_bytes
from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust import sidecar_json, tree_file
from lazy_orbax.trust.contents import Contents, contents_of, describing_arrays
from lazy_orbax.trust.declared_sizes import refuse_oversize
from lazy_orbax.trust.files import ItemFiles, brief, survey
from lazy_orbax.trust.ocdbt_decode import SMALL_NODE_BYTES
from lazy_orbax.trust.ocdbt_nodes import likely_nodes
from lazy_orbax.trust.zarr_arrays import MOST_METADATA_BYTES

# Parsed JSON takes up to 25 times its text: this is a tenth of memory. `_METADATA` has about 220
# bytes a leaf, and 16 MiB are 76,000 leaves.
_LEAST_JSON_BYTES = 16 * 2**20
_JSON_SHARE = 256
# `_sharding` lists every device of the mesh for every leaf, in strings that stay strings.
_SHARDING_SHARE = 32
# Small arrays are in the file of older checkpoints itself.
_AGGREGATE_SHARE = 8
_AGGREGATE_FILE = "checkpoint"


# What a face has checked already, while it restores through the handler inside.
_CHECKED: contextvars.ContextVar[Contents | None] = contextvars.ContextVar(
    "lazy_orbax_checked", default=None
)


@contextlib.contextmanager
def checked(
    directory: Any, args: Any, aggregate: str | None = None, beside: str = ""
) -> Iterator[Contents | None]:
    """Refuses a malformed checkpoint once, whatever is nested within. Gives what it holds.

    Args:
        directory: the item's directory.
        args: what is to be restored; `None` for metadata alone.
        aggregate: the file in which older checkpoints keep small arrays, if not `checkpoint`.
        beside: a folder of the item whose files are wanted as well.

    Raises:
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
    """
    known = _CHECKED.get()
    if known is not None and known.directory == str(directory):
        yield known
        return
    with _examined(directory, args, aggregate or _AGGREGATE_FILE, beside) as contents:
        token = _CHECKED.set(contents)
        try:
            yield contents
        except Exception as error:
            if str(directory) not in str(error):
                error.add_note(f"This was while reading the checkpoint {directory}.")
            raise
        finally:
            _CHECKED.reset(token)


def refuse_malformed(
    directory: Any, args: Any, beside: str = "", like: Contents | None = None
) -> Contents | None:
    """Checks the files of an item, what they declare, and whether this machine could hold it.

    Args:
        directory: the item's directory, local or `gs://`. Where there is none, nothing is checked.
        args: what is to be restored; `None` for metadata alone.
        beside: a folder of the item whose files are wanted as well.
        like: what another item holds: files that are the same as its are not looked at again.

    Returns:
        What it holds; `None` where there is no such directory.

    Raises:
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote, or is too large for this
            machine and no target says that so much is wanted.
    """
    with _examined(directory, args, _AGGREGATE_FILE, beside, like) as contents:
        return contents


@contextlib.contextmanager
def _examined(
    directory: Any, args: Any, aggregate: str, beside: str, like: Contents | None = None
) -> Iterator[Contents | None]:
    place = place_of(str(directory))
    if not place.may_be_there():
        yield None
        return
    with place.listed() as listed:
        sizes = survey(place.directory) if place.has_special_files else listed
        files = ItemFiles(place, sizes)
        limit_bytes = max(_LEAST_JSON_BYTES, memory_bytes() // _JSON_SHARE)
        _read_ahead(files, args, beside, limit_bytes)
        _check_aggregate(files, aggregate, memory_bytes() // _AGGREGATE_SHARE)
        contents = contents_of(files, *_check_json(files, limit_bytes, args, like))
        arrays, tree = contents.declared(), contents.tree
        names = arrays.declared.keys() & tree.leaves.keys() if tree else arrays.declared.keys()
        refuse_oversize(directory, arrays, set(names), args)
        yield contents


def _read_ahead(files: ItemFiles, args: Any, beside: str, limit_bytes: int) -> None:
    """Starts to read what will be wanted, where that can be told in advance."""
    if files.sizes is None or files.place.has_special_files:
        return
    names = [_paths.TREE, _paths.STRINGS, *files.names(_paths.ARRAY_METADATAS)]
    names += [_paths.SHARDINGS] if beside or _needs_shardings(args) else []
    files.read_ahead(names, limit_bytes)
    files.read_ahead(files.names(beside) if beside else (), MOST_BYTES)
    if files.size(_paths.MANIFEST) is None:
        files.read_ahead(describing_arrays(files), MOST_METADATA_BYTES)
    else:
        files.read_ahead([_paths.MANIFEST, *likely_nodes(files)], SMALL_NODE_BYTES)


def _check_aggregate(files: ItemFiles, name: str, limit_bytes: int) -> None:
    """Checks the file in which older checkpoints keep their structure, if there is one.

    Raises:
        MalformedCheckpointError: it is too large, or not what Orbax can read.
    """
    if files.place.has_special_files and files.place.has_directory(name):
        return  # An array has that name.
    if (content := files.read(name, limit_bytes)) is None:
        return
    from lazy_orbax._orbax.symbols import (
        ocp,  # It takes a second to import, and few have such a file.
    )

    try:
        ocp.msgpack_utils.msgpack_restore(content)
    except Exception as error:
        raise MalformedCheckpointError(
            files.path(name),
            f"{len(content)} bytes that are no tree in msgpack ({brief(repr(error))})",
            "what Orbax wrote",
        ) from error


def _check_json(
    files: ItemFiles, limit_bytes: int, args: Any, like: Contents | None
) -> tuple[tree_file.Tree | None, dict[str, str]]:
    """Checks those of Orbax's JSON files that will be read.

    Returns:
        What `_METADATA` says, and the kinds of the leaves that are typed PRNG keys, by name.
    """
    tree, keys = None, dict[str, str]()
    if _is_same(_paths.TREE, files, like, limit_bytes):
        tree = like and like.tree
    elif (found := files.read(_paths.TREE, limit_bytes)) is not None:
        tree = tree_file.check_tree(found, files.path(_paths.TREE))
    if _needs_shardings(args):
        most_bytes = max(limit_bytes, memory_bytes() // _SHARDING_SHARE)
        if (found := files.read(_paths.SHARDINGS, most_bytes)) is not None:
            sidecar_json.check_shardings(found, files.path(_paths.SHARDINGS))
    names = _array_metadatas(files)
    are_known = like is not None and names == _array_metadatas(like.files)
    if like and are_known and all(_is_same(name, files, like, limit_bytes) for name in names):
        keys, names = dict(like.keys), []
    for name in names:
        if (found := files.read(name, limit_bytes)) is not None:
            keys |= sidecar_json.check_array_metadatas(found, files.path(name))
    strings = [name for name, kind in (tree.leaves if tree else {}).items() if kind == "string"]
    if strings and (found := files.read(_paths.STRINGS, limit_bytes)) is not None:
        sidecar_json.check_strings(found, files.path(_paths.STRINGS), strings)
    return tree, keys


def _array_metadatas(files: ItemFiles) -> list[str]:
    start = f"{_paths.ARRAY_METADATAS}/process_"
    return [name for name in files.names(_paths.ARRAY_METADATAS) if name.startswith(start)]


def _is_same(name: str, files: ItemFiles, like: Contents | None, limit_bytes: int) -> bool:
    """Whether a file is there, and is the same in another item, where it was checked."""
    if like is None or (found := files.read(name, limit_bytes)) is None:
        return False
    return found == like.files.read(name, limit_bytes)


def _needs_shardings(args: Any) -> bool:
    """Whether Orbax will read `_sharding`: for metadata, and for what has no target."""
    if args is None:
        return True
    import jax

    is_leaf = lambda leaf: hasattr(leaf, "restore_type")  # noqa: E731
    leaves = jax.tree.leaves(getattr(args, "restore_args", None), is_leaf=is_leaf)
    return not leaves or any(
        getattr(leaf, "restore_type", None) in (None, jax.Array)
        and getattr(leaf, "sharding", None) is None
        and getattr(leaf, "mesh", None) is None
        for leaf in leaves
    )
