"""The file that says what tree an item is, checked before Orbax builds that tree from it."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

from lazy_orbax._orbax.stored_kinds import DICT, EMPTY, SEQUENCE
from lazy_orbax.trust.bounded_json import Complain, Complaints, is_shape, parse_json

# JAX and Python walk trees recursively. Without a limit of Python's a stack of 8 MiB would overflow
# at some 30 000 levels.
_MOST_LEVELS = 10_000

Path = tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """What `_METADATA` says.

    Attributes:
        leaves: the type that each leaf is restored as, by the name it is stored under.
        paths: the name that each leaf is stored under, by its path: for each key whether it is one
            of a sequence (1) or of a dictionary (2), and its text.
        use_ocdbt: whether arrays are in OCDBT; `None` where it does not say.
        use_zarr3: whether they are in Zarr's third version; `None` where it does not say.
        stores_fill_values: whether every chunk is stored: a missing one is lost.
        is_rich: whether there is a second form of the tree, with its containers' classes.
    """

    leaves: dict[str, str]
    paths: dict[Path, str]
    use_ocdbt: bool | None
    use_zarr3: bool | None
    stores_fill_values: bool
    is_rich: bool


def check_tree(content: bytes, file: Any) -> Tree:
    """Checks `_METADATA`.

    Args:
        content: of the file.
        file: its path.

    Raises:
        MalformedCheckpointError: fields are missing or of the wrong type, or make no tree.
    """
    metadata, complain = parse_json(content, file), Complaints(file)
    for name in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"):
        if not isinstance(metadata.get(name), bool | None):
            complain(name, metadata[name], "true or false")
    entries = metadata.get("tree_metadata")
    if not isinstance(entries, dict):
        complain("tree_metadata", entries, "a JSON object")
        entries = {}
    leaves: dict[str, str] = {}
    paths: dict[Path, str] = {}
    root: dict[Any, Any] = {}
    for keypath, entry in entries.items():
        if not isinstance(entry, dict):
            complain((keypath, "entry"), entry, "a JSON object")
            continue
        keys = _check_keys(entry.get("key_metadata"), keypath, complain)
        value_type = _check_value(entry.get("value_metadata"), keypath, complain)
        if keys == [] and len(entries) > 1:
            complain((keypath, "key_metadata"), keys, "a key: there are other leaves")
        elif keys is not None and value_type is not None:
            _place(root, keys)
            name = paths[tuple(keys)] = ".".join([key for _, key in keys])
            leaves[name] = value_type
    _check_containers(root, complain)
    rich = metadata.get("value_metadata_tree")
    _check_rich(parse_json(rich, file, object) if isinstance(rich, str) else rich, complain)
    complain.raise_all()
    return Tree(
        leaves,
        paths,
        metadata.get("use_ocdbt"),
        metadata.get("use_zarr3"),
        stores_fill_values=metadata.get("store_array_data_equal_to_fill_value") is True,
        is_rich=rich is not None,
    )


def _check_keys(keys: Any, keypath: str, complain: Complain) -> list[tuple[int, str]] | None:
    if not isinstance(keys, list) or len(keys) > _most_levels():
        found = f"{len(keys)} levels" if isinstance(keys, list) else keys
        complain((keypath, "key_metadata"), found, f"a list of at most {_most_levels()} keys")
        return None
    path = []
    for key in keys:
        name, kind = (key.get("key"), key.get("key_type")) if isinstance(key, dict) else (key, None)
        if (
            not isinstance(name, str)
            or (not name.isascii() and re.search("[\ud800-\udfff]", name))
            or type(kind) is not int
            or kind not in (SEQUENCE, DICT)
        ):
            complain((keypath, "key_metadata"), key, "a key of a dictionary or a sequence")
            return None
        if kind == SEQUENCE and not (name.isascii() and name.isdigit() and len(name) < 19):
            complain((keypath, "key_metadata"), name, "the position in a sequence")
            return None
        path.append((kind, name))
    return path


def _most_levels() -> int:
    """Returns the levels of a tree that can have been saved here, and can be walked safely."""
    return min(sys.getrecursionlimit(), _MOST_LEVELS)


def _check_value(value: Any, keypath: str, complain: Complain) -> str | None:
    if not isinstance(value, dict):
        complain((keypath, "value_metadata"), value, "a JSON object")
        return None
    value_type, skip = value.get("value_type"), value.get("skip_deserialize")
    if not isinstance(skip, bool):
        complain((keypath, "skip_deserialize"), skip, "true or false")
    if not isinstance(value_type, str):
        complain((keypath, "value_type"), value_type, "the name of a type")
    if "write_shape" in value and not is_shape(value["write_shape"]):
        complain((keypath, "write_shape"), value["write_shape"], "a list of sizes")
    kind = str(value_type)
    return "None" if skip is True and kind not in EMPTY else kind


def _place(root: dict[Any, Any], keys: list[tuple[int, str]]) -> None:
    """Puts a key path into a tree of dictionaries."""
    node = root
    for key in keys:
        node = node.setdefault(key, {})


def _check_containers(root: dict[Any, Any], complain: Complain) -> None:
    """Checks that each container is a dictionary, or a sequence without gaps."""
    pending = [("the tree", root)]
    while pending:
        name, node = pending.pop()
        positions = sorted(int(name) for kind, name in node if kind == SEQUENCE)
        if positions and positions != list(range(len(node))):
            found = [name for _, name in node]
            complain((name, "keys"), found, "one kind of key, and positions without gaps")
            continue
        pending += [(name, inner) for (_, name), inner in node.items() if inner]


def _check_rich(tree: Any, complain: Complain) -> None:
    """Checks the tree with rich types, which is another form of the same."""
    pending = [(tree, 0)]
    while pending:
        value, level = pending.pop()
        # Each level of the tree takes some of JSON.
        if level > 3 * _most_levels():
            complain("value_metadata_tree", f"{level} levels", f"at most {3 * _most_levels()}")
            return
        if isinstance(value, dict | list):
            if isinstance(value, dict) and value.get("category") == "namedtuple":
                _check_namedtuple(value, complain)
            inner = value.values() if isinstance(value, dict) else value
            pending += [(one, level + 1) for one in inner]


def _check_namedtuple(value: dict[str, Any], complain: Complain) -> None:
    entries, names = value.get("entries"), [value.get("module"), value.get("clazz")]
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        names += [entry.get("key") for entry in entries]
    else:
        complain("value_metadata_tree", entries, "the fields of a named tuple")
    for name in names:
        parts = name.split(".") if isinstance(name, str) else [""]
        if not all(part.isidentifier() or part == "<locals>" for part in parts):
            complain("value_metadata_tree", name, "the name of a class or a field")
