"""The small files beside the arrays, against their digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.errors import MalformedCheckpointError, Problem
from lazy_orbax.integrity.digest import digest_of_bytes, digest_of_text
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.trust.files import ItemFiles


def changed_files(files: ItemFiles, wanted: Mapping[str, tuple[int, int]]) -> list[Problem]:
    """Returns which files are not those that were written.

    Args:
        files: the item's files.
        wanted: size in bytes and digest of each, by name.
    """
    problems = []
    files.read_ahead((n for n, (size, _) in wanted.items() if files.size(n) == size), MOST_BYTES)
    for name, (size, digest) in wanted.items():
        content = _content(files, name, size)
        if isinstance(content, Problem):
            problems.append(content)
        elif digest_of_bytes(content) != digest:
            problems.append(Problem(f"its {size} bytes are not those that were written", name))
    return problems


def changed_strings(files: ItemFiles, wanted: Mapping[str, int]) -> list[Problem]:
    """Returns which leaves are not the strings that were saved.

    Args:
        files: the item's files.
        wanted: the digest of each, by the name of the leaf.
    """
    size = files.size(_paths.STRINGS) if wanted else 0
    if size is None or size > MOST_BYTES:
        return [Problem("is missing" if size is None else f"has {size} bytes", _paths.STRINGS)]
    try:
        found = json.loads(files.read(_paths.STRINGS, MOST_BYTES) or b"") if wanted else {}
    except (ValueError, OSError, RecursionError, MalformedCheckpointError) as error:
        return [Problem(f"cannot be read: {error}", _paths.STRINGS)]
    return [
        Problem("is not the string that was saved", _paths.STRINGS, name)
        for name, digest in wanted.items()
        if not isinstance(text := string_at(found, name), str) or digest_of_text(text) != digest
    ]


def _content(files: ItemFiles, name: str, size: int) -> bytes | Problem:
    """Returns a file of a certain size, or what is wrong with it."""
    found = files.size(name)
    if found == size:
        try:
            content = files.read(name, MOST_BYTES)
        except (ValueError, OSError, MalformedCheckpointError) as error:
            return Problem(f"cannot be read: {error}", name)
        if content is not None and len(content) == size:
            return content
        found = None if content is None else len(content)
    if found is None:
        return Problem("is missing", name)
    return Problem(f"has {found} bytes, but {size} were written", name)


def string_at(found: Any, name: str) -> Any:
    """Returns the value at a leaf's name, which Orbax takes for a JSON pointer; `None`: none is."""
    for key in name.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found
