"""Orbax's JSON files, checked field by field before Orbax builds trees and shardings from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.file_checks import brief, parse_json

# JAX walks trees recursively.
_MOST_LEVELS = 256
_MOST_DIMENSIONS = 32
_ENTRIES = "array_metadatas"
_SEQUENCE, _DICT = 1, 2
_AXIS_TYPES = frozenset(map(str, jax.sharding.AxisType))

# Says where (for a leaf its key path, and the part), what was found and what was wanted.
Complain = Callable[[str | tuple[str, str], Any, str], None]


@dataclasses.dataclass(frozen=True)
class Tree:
    """What `_METADATA` says.

    Attributes:
        leaves: the type that each leaf is restored as, by the name it is stored under.
        use_ocdbt: whether arrays are in OCDBT; `None` where it does not say.
    """

    leaves: dict[str, str]
    use_ocdbt: bool | None


class _Complaints:
    """Collects what is wrong in one file."""

    def __init__(self, file: Any):
        self._file, self._problems = file, []

    def __call__(self, where: str | tuple[str, str], found: Any, wanted: str) -> None:
        if isinstance(where, tuple):  # Put into words only where there is something to say.
            where = f"leaf {brief(where[0])}, {where[1]}"
        self._problems.append(f"{where}: found {brief(found)}, wanted {wanted}")

    def raise_all(self) -> None:
        if self._problems:
            raise MalformedCheckpointError.of(self._file, self._problems)


def check_tree(content: bytes, file: Any) -> Tree:
    """Checks `_METADATA`.

    Args:
        content: of the file.
        file: its path.

    Raises:
        MalformedCheckpointError: fields are missing or of the wrong type, or make no tree.
    """
    metadata, complain = parse_json(content, file), _Complaints(file)
    for name in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"):
        if not isinstance(metadata.get(name), bool | None):
            complain(name, metadata[name], "true or false")
    entries = metadata.get("tree_metadata")
    if not isinstance(entries, dict):
        complain("tree_metadata", entries, "a JSON object")
        entries = {}
    leaves: dict[str, str] = {}
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
            leaves[".".join(name for _, name in keys)] = value_type
    _check_containers(root, complain)
    rich = metadata.get("value_metadata_tree")
    _check_rich(parse_json(rich, file, object) if isinstance(rich, str) else rich, complain)
    complain.raise_all()
    return Tree(leaves, metadata.get("use_ocdbt"))


def _check_keys(keys: Any, keypath: str, complain: Complain) -> list[tuple[int, str]] | None:
    if not isinstance(keys, list) or len(keys) > _MOST_LEVELS:
        found = f"{len(keys)} levels" if isinstance(keys, list) else keys
        complain((keypath, "key_metadata"), found, f"a list of at most {_MOST_LEVELS} keys")
        return None
    path = []
    for key in keys:
        name, kind = (key.get("key"), key.get("key_type")) if isinstance(key, dict) else (key, None)
        if (
            not isinstance(name, str)
            or re.search("[\ud800-\udfff]", name)
            or type(kind) is not int
            or kind not in (_SEQUENCE, _DICT)
        ):
            complain((keypath, "key_metadata"), key, "a key of a dictionary or a sequence")
            return None
        if kind == _SEQUENCE and not (name.isascii() and name.isdigit() and len(name) < 19):
            complain((keypath, "key_metadata"), name, "the position in a sequence")
            return None
        path.append((kind, name))
    return path


def _check_value(value: Any, keypath: str, complain: Complain) -> str | None:
    if not isinstance(value, dict):
        complain((keypath, "value_metadata"), value, "a JSON object")
        return None
    value_type, skip = value.get("value_type"), value.get("skip_deserialize")
    if not isinstance(skip, bool):
        complain((keypath, "skip_deserialize"), skip, "true or false")
    if not isinstance(value_type, str):
        complain((keypath, "value_type"), value_type, "the name of a type")
    if "write_shape" in value and not _is_shape(value["write_shape"]):
        complain((keypath, "write_shape"), value["write_shape"], "a list of sizes")
    return "None" if skip is True else str(value_type)


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
        positions = sorted(int(name) for kind, name in node if kind == _SEQUENCE)
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
        if level > 3 * _MOST_LEVELS:
            complain("value_metadata_tree", f"{level} levels", f"at most {3 * _MOST_LEVELS}")
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


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 2**62 for size in value)


def check_array_metadatas(content: bytes, file: Any) -> None:
    """Checks one of the files in `array_metadatas`.

    Raises:
        MalformedCheckpointError: fields are missing or of the wrong type.
    """
    metadata, complain = parse_json(content, file), _Complaints(file)
    entries = metadata.get(_ENTRIES, [])
    if not isinstance(entries, list):
        complain(_ENTRIES, entries, "a list")
        entries = []
    if _nested([metadata], (_ENTRIES,)):
        complain(_ENTRIES, metadata, "nothing else")
    for position, entry in enumerate(entries):
        one = entry.get("array_metadata") if isinstance(entry, dict) else None
        where = f"entry {position}"
        if not isinstance(one, dict) or not isinstance(one.get("param_name"), str):
            complain(where, entry, "the metadata of a named array")
            continue
        # Orbax takes any object of that name for another entry.
        inner = [entry, one, one.get("ext_metadata") or {}]
        if _nested(inner, ("array_metadata", "write_shape", "chunk_shape", "ext_metadata")):
            complain(where, entry, "nothing but the metadata of an array")
        for name in ("write_shape", "chunk_shape"):
            if not _is_shape(one.get(name)):
                complain(f"{where}, {name}", one.get(name), "a list of sizes")
        if not isinstance(one.get("ext_metadata"), dict | None):
            complain(f"{where}, ext_metadata", one["ext_metadata"], "a JSON object or null")
    complain.raise_all()


def _nested(objects: list[Any], known: tuple[str, ...]) -> bool:
    """Whether there are objects or lists in fields that are not known."""
    return any(
        isinstance(value, dict | list) and name not in known
        for one in objects
        if isinstance(one, dict)
        for name, value in one.items()
    )


def check_shardings(content: bytes, file: Any) -> None:
    """Checks `_sharding`.

    Raises:
        MalformedCheckpointError: fields are missing or of the wrong type.
    """
    complain, seen = _Complaints(file), set()
    for name, text in parse_json(content, file).items():
        if not isinstance(text, str):
            complain((name, "sharding"), text, "JSON in a string")
        elif text not in seen:  # Thousands of leaves share a few.
            seen.add(text)
            for part, found, wanted in _misfits_of_sharding(parse_json(text, file)):
                complain((name, part), found, wanted)
    complain.raise_all()


def _misfits_of_sharding(sharding: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    kind = sharding.get("sharding_type")
    if kind == "SingleDeviceSharding" and not isinstance(sharding.get("device_str"), str):
        yield "device_str", sharding.get("device_str"), "a device's name"
    if not isinstance(kind, str):
        yield "sharding_type", kind, "a type of sharding"
    if kind != "NamedSharding":
        return
    shape, names = sharding.get("shape"), sharding.get("axis_names")
    if not (isinstance(shape, list) and _is_shape(shape)):
        yield "shape", shape, "the sizes of a mesh"
    elif not (isinstance(names, list) and _are_strings(names) and len(names) == len(shape)):
        yield "axis_names", names, f"{len(shape)} names"
    spec = sharding.get("partition_spec")
    if not isinstance(spec, list) or not all(
        part is None or isinstance(part, str) or _are_strings(part) for part in spec
    ):
        yield "partition_spec", spec, "a list of axis names"
    kinds = sharding.get("axis_types") or []
    if not _are_strings(kinds) or not _AXIS_TYPES.issuperset(kinds):
        yield "axis_types", kinds, f"some of {', '.join(sorted(_AXIS_TYPES))}"
    mesh = sharding.get("device_mesh")
    if mesh is not None and not (isinstance(mesh, dict) and _is_mesh(mesh.get("mesh"))):
        yield "device_mesh", mesh, "nested lists of device ids"


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_mesh(mesh: Any) -> bool:
    pending = [(mesh, 0)]
    while pending:
        value, level = pending.pop()
        if isinstance(value, list) and level < _MOST_DIMENSIONS:
            pending += [(one, level + 1) for one in value]
        elif not (isinstance(value, dict) and type(value.get("id")) is int):
            return False
    return True


def check_strings(content: bytes, file: Any, names: list[str]) -> None:
    """Checks `_strings.json`, of which the leaves `names` are restored.

    Raises:
        MalformedCheckpointError: a leaf is missing or no string.
    """
    strings, complain = parse_json(content, file), _Complaints(file)
    for name in names:
        value: Any = strings
        for part in name.split("/"):  # A JSON pointer: that is how Orbax reads it.
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str):
            complain(f"leaf {brief(name)}", value, "a string")
    complain.raise_all()
