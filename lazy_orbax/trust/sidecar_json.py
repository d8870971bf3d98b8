"""Orbax's other JSON files, checked field by field before Orbax builds shardings from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lazy_orbax.trust.bounded_json import MOST_DIMENSIONS, Complaints, is_shape, parse_json
from lazy_orbax.trust.files import brief

_ENTRIES, _KEY_IMPL = "array_metadatas", "random_key_impl"
_NESTED_IN_ENTRIES = ("array_metadata", "write_shape", "chunk_shape", "ext_metadata")
# Those of `jax.sharding.AxisType`.
_AXIS_TYPES = frozenset(f"AxisType.{kind}" for kind in ("Auto", "Explicit", "Manual"))


def check_array_metadatas(content: bytes, file: Any) -> dict[str, str]:
    """Checks one of the files in `array_metadatas`. Returns the kinds of typed keys, by name.

    Raises:
        MalformedCheckpointError: fields are missing or of the wrong type.
    """
    metadata, complain = parse_json(content, file), Complaints(file)
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
        if _nested([entry, one, one.get("ext_metadata")], _NESTED_IN_ENTRIES):
            complain(where, entry, "nothing but the metadata of an array")
        for name in ("write_shape", "chunk_shape"):
            if not is_shape(one.get(name)):
                complain(f"{where}, {name}", one.get(name), "a list of sizes")
        more = one.get("ext_metadata")
        if more is not None and not isinstance(more, dict):
            complain(f"{where}, ext_metadata", more, "a JSON object or null")
        elif more and not isinstance(more.get(_KEY_IMPL), str | None):
            complain(f"{where}, {_KEY_IMPL}", more[_KEY_IMPL], "the name of a kind of keys")
    complain.raise_all()
    arrays = [entry["array_metadata"] for entry in entries]
    kinds = {one["param_name"]: (one.get("ext_metadata") or {}).get(_KEY_IMPL) for one in arrays}
    return {name: kind for name, kind in kinds.items() if kind}


def _nested(objects: list[Any], known: tuple[str, ...]) -> bool:
    """Whether there are objects or lists in fields that are not known."""
    for one in objects:
        for name, value in one.items() if type(one) is dict else ():
            if (type(value) is dict or type(value) is list) and name not in known:
                return True
    return False


def check_shardings(content: bytes, file: Any) -> None:
    """Checks `_sharding`.

    Raises:
        MalformedCheckpointError: fields are missing or of the wrong type.
    """
    complain, seen = Complaints(file), set()
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
    if not (isinstance(shape, list) and is_shape(shape)):
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
        if isinstance(value, list) and level < MOST_DIMENSIONS:
            pending += [(one, level + 1) for one in value]
        elif not (isinstance(value, dict) and type(value.get("id")) is int):
            return False
    return True


def check_strings(content: bytes, file: Any, names: list[str]) -> None:
    """Checks `_strings.json`, of which the leaves `names` are restored.

    Raises:
        MalformedCheckpointError: a leaf is missing or no string.
    """
    strings, complain = parse_json(content, file), Complaints(file)
    for name in names:
        value: Any = strings
        for part in name.split("/"):  # A JSON pointer: that is how Orbax reads it.
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str):
            complain(f"leaf {brief(name)}", value, "a string")
    complain.raise_all()
