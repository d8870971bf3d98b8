"""The small files beside the arrays, against their digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax.errors import Problem
from lazy_orbax.integrity.digest import digest_of_bytes, digest_of_text
from lazy_orbax.storage.place import MOST_BYTES, Place


def changed_files(
    place: Place, store: ts.KvStore, wanted: Mapping[str, tuple[int, int]]
) -> list[Problem]:
    """Returns which files are not those that were written.

    Args:
        place: the item's directory.
        store: the same, to read from.
        wanted: size in bytes and digest of each, by name.
    """
    problems = []
    sizes = {name: place.size(name) for name in wanted}
    reads = {name: store.read(name) for name, (size, _) in wanted.items() if sizes[name] == size}
    for name, (size, digest) in wanted.items():
        if sizes[name] is None:
            problems.append(Problem("is missing", name))
        elif name not in reads:
            what = f"has {sizes[name]} bytes, but {size} were written"
            problems.append(Problem(what, name))
        elif isinstance(content := _content(reads[name]), Exception):
            problems.append(Problem(f"cannot be read: {content}", name))
        elif digest_of_bytes(content) != digest:
            problems.append(Problem(f"its {size} bytes are not those that were written", name))
    return problems


def changed_strings(place: Place, store: ts.KvStore, wanted: Mapping[str, int]) -> list[Problem]:
    """Returns which leaves are not the strings that were saved.

    Args:
        place: the item's directory.
        store: the same, to read from.
        wanted: the digest of each, by the name of the leaf.
    """
    size = place.size(_paths.STRINGS) if wanted else 0
    if size is None or size > MOST_BYTES:
        return [Problem("is missing" if size is None else f"has {size} bytes", _paths.STRINGS)]
    try:
        found = json.loads(store.read(_paths.STRINGS).result().value) if wanted else {}
    except (ValueError, OSError, RecursionError) as error:
        return [Problem(f"cannot be read: {error}", _paths.STRINGS)]
    return [
        Problem("is not the string that was saved", _paths.STRINGS, name)
        for name, digest in wanted.items()
        if not isinstance(text := string_at(found, name), str) or digest_of_text(text) != digest
    ]


def _content(read: Any) -> bytes | Exception:
    try:
        return read.result().value
    except (ValueError, OSError) as error:
        return error


def string_at(found: Any, name: str) -> Any:
    """Returns the value at a leaf's name, which Orbax takes for a JSON pointer; `None`: none is."""
    for key in name.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found
