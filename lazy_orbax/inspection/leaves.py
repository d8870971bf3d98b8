"""The leaves of an item, from its metadata alone."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lazy_orbax import _paths
from lazy_orbax._machine import memory_bytes, without_garbage_collection
from lazy_orbax._orbax.stored_kinds import EMPTY
from lazy_orbax.errors import Problem
from lazy_orbax.integrity.digest_file import DigestError, LeafDigests, parse
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.trust.malformed import refuse_malformed


@dataclasses.dataclass(frozen=True, slots=True)
class LeafEntry:
    """What is to be seen of a leaf without reading its values.

    Attributes:
        name: as Orbax names it, its keys joined by dots.
        keys: its keys.
        kind: the type that it is restored as, such as `jax.Array`, `scalar` or `string`.
        dtype: of its elements on storage; empty where it is no array.
        shape: of the array.
        chunk: shape of what is stored under one key.
        sharding: the sharding that it had when it was saved, in a few words.
        n_bytes: of its elements, decoded.
        stored_bytes: of what is stored, if that was told.
        is_covered: whether there are digests of it.
    """

    name: str
    keys: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    sharding: str
    n_bytes: int
    stored_bytes: int | None
    is_covered: bool


class ItemLeaves:
    """What the metadata of an item say of its leaves.

    Attributes:
        directory: the item's directory.
        contents: what was found there.
        problems: what is wrong with the digests themselves.
    """

    def __init__(self, directory: str, like: ItemLeaves | None = None):
        """Reads the metadata.

        Args:
            directory: the item's directory, or its address.
            like: another item, whose metadata may be the same in part.

        Raises:
            MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
            OSError: the storage refused.
        """
        with without_garbage_collection():
            contents = refuse_malformed(directory, None, _paths.DIGESTS, like and like.contents)
        if contents is None:
            raise FileNotFoundError(f"{directory} is not there.")
        self.directory, self.contents = directory, contents
        self.problems: list[Problem] = []

    @functools.cached_property
    def entries(self) -> tuple[LeafEntry, ...]:
        """The leaves, in the order of the tree."""
        with without_garbage_collection():
            return tuple(self._entries())

    @property
    def storage(self) -> str:
        """How arrays are stored, in a few words."""
        contents = self.contents
        zarr3 = contents.tree is not None and contents.tree.use_zarr3
        form = "zarr3" if zarr3 else "zarr"
        return f"{form} in ocdbt" if contents.in_database else form

    @functools.cached_property
    def digests(self) -> dict[str, LeafDigests]:
        """The digests of each leaf, by its name; of strings there are `strings`."""
        return self._digests[0]

    @functools.cached_property
    def strings(self) -> dict[str, int]:
        """The digest of each leaf that is a string, by its name."""
        return self._digests[1]

    @functools.cached_property
    def shardings(self) -> dict[str, str]:
        """What `_sharding` says of each leaf, by its name: JSON in a string, which was checked."""
        most_bytes = max(2**24, memory_bytes() // 32)
        content = self.contents.files.read(_paths.SHARDINGS, most_bytes)
        found: dict[str, str] = {}
        for name, text in (json.loads(content) if content else {}).items():
            try:
                found[base64.b64decode(name, validate=True).decode()] = text
            except (binascii.Error, ValueError):  # A name that nobody looks for.
                continue
        return found

    @functools.cached_property
    def _digests(self) -> tuple[dict[str, LeafDigests], dict[str, int]]:
        leaves, strings = dict[str, LeafDigests](), dict[str, int]()
        files = self.contents.files
        for file in files.names(_paths.DIGESTS):
            if not file.rpartition("/")[2].startswith("process_"):
                continue
            try:
                part = parse(files.read(file, MOST_BYTES) or b"")
            except (DigestError, ValueError) as error:
                self.problems.append(Problem(f"cannot be used: {error}", file))
                continue
            strings |= part.strings
            for leaf in part.leaves:
                known = leaves.get(leaf.name)
                leaves[leaf.name] = known.joined(leaf) if known else leaf
        return leaves, strings

    def _entries(self) -> Iterator[LeafEntry]:
        arrays, stored = self._arrays(), self._stored_bytes()
        tree, covered = self.contents.tree, self.digests.keys() | self.strings.keys()
        if tree is None:
            named = {name: ((name,), "array") for name in arrays}
        else:
            keys = ((name, tuple(text for _, text in path)) for path, name in tree.paths.items())
            named = {name: (path, tree.leaves[name]) for name, path in keys}
        words = functools.lru_cache(maxsize=4096)(sharding_in_words)
        texts = {name: words(said) for name, said in self.shardings.items()}
        nothing = ("", (), (), 0)
        for name, (keys, kind) in named.items():
            dtype, shape, chunk, n_bytes = arrays.get(name, nothing)
            if kind in EMPTY or kind == "string":
                dtype, shape, chunk, n_bytes = nothing
            kind = f"key {self.contents.keys[name]}" if name in self.contents.keys else kind
            held = stored.get(name) if stored is not None else None
            yield LeafEntry(
                *(name, keys, kind, dtype, shape, chunk, texts.get(name, ""), n_bytes),
                *(held, name in covered),
            )

    def _arrays(self) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]]:
        """Returns dtype, shape, chunk and bytes of each array, by its name."""
        declared = self.contents.declared().declared
        found = {}
        for path, content in self.contents.descriptions.items():
            name = path.rpartition("/")[0]
            dtype, chunk = _dtype_and_chunk(content)
            found[name] = (dtype, declared[name].shape, chunk, declared[name].total_bytes)
        return found

    def _stored_bytes(self) -> dict[str, int] | None:
        """Returns the bytes that are stored of each array, by its name."""
        if self.contents.values is None:
            return None
        names = {path.rpartition("/")[0] for path in self.contents.descriptions}
        found = dict.fromkeys(names, 0)
        for path, value in self.contents.values.items():
            name = path.rpartition("/")[0]
            while name and name not in names:
                name = name.rpartition("/")[0]
            if name in names:
                found[name] += len(value) if isinstance(value, bytes) else value.length
        return found


@functools.lru_cache(maxsize=4096)
def _dtype_and_chunk(content: bytes) -> tuple[str, tuple[int, ...]]:
    """Returns what the metadata of an array say, which were checked."""
    found = json.loads(content)
    if found.get("zarr_format") == 3:
        return found["data_type"], tuple(found["chunk_grid"]["configuration"]["chunk_shape"])
    dtype = found["dtype"]
    return np.dtype(dtype).name if dtype[0] in "<>|" else dtype, tuple(found["chunks"])


def sharding_in_words(sharding: str) -> str:
    """Returns what a sharding is, such as `(data, None) over data=4, model=2`.

    Args:
        sharding: JSON, as Orbax writes it.
    """
    said = json.loads(sharding)
    kind = said.get("sharding_type", "")
    if kind == "SingleDeviceSharding":
        return str(said.get("device_str"))
    if kind != "NamedSharding":
        return str(kind)
    spec = ", ".join(_axes_in_words(part) for part in said["partition_spec"])
    sizes = zip(said["axis_names"], said["shape"])
    return f"({spec}) over {', '.join(f'{name}={size}' for name, size in sizes)}"


def _axes_in_words(part: Any) -> str:
    return "+".join(part) if isinstance(part, list) else str(part)


def drawing_of(sharding: str, most: int = 16) -> tuple[str, ...]:
    """Draws which devices have which part of an array; nothing where that says nothing.

    Args:
        sharding: of one leaf, JSON, as Orbax writes it.
        most: no more parts than this are drawn in a row or column.
    """
    return _drawing_of(json.loads(sharding), most)


def _drawing_of(sharding: Mapping[str, Any], most: int) -> tuple[str, ...]:
    mesh = (sharding.get("device_mesh") or {}).get("mesh")
    spec = sharding.get("partition_spec")
    if sharding.get("sharding_type") != "NamedSharding" or mesh is None or spec is None:
        return ()
    sizes = dict(zip(sharding["axis_names"], sharding["shape"]))
    parts = [_list(part) for part in spec]
    known = {name for part in parts for name in part} <= sizes.keys()
    rows, columns = [*parts, [], []][:2]
    counts = [math.prod(sizes[n] for n in part) if known else 0 for part in (rows, columns)]
    if not known or any(parts[2:]) or not math.prod(counts) > 1 or max(counts) > most:
        return ()
    cells: dict[tuple[int, int], list[int]] = {}
    for place, device in _devices(mesh):
        if len(place) != len(sizes):
            return ()
        at = dict(zip(sizes, place))
        cells.setdefault((_index(rows, at, sizes), _index(columns, at, sizes)), []).append(device)
    texts = [
        [",".join(map(str, sorted(cells.get((r, c), [])))) for c in range(counts[1])]
        for r in range(counts[0])
    ]
    width = max(len(text) for row in texts for text in row) + 2
    rule = lambda a, b, c: a + b.join(["─" * width] * counts[1]) + c  # noqa: E731
    lines = [rule("┌", "┬", "┐")]
    for n, row in enumerate(texts):
        lines += [rule("├", "┼", "┤")] * (n > 0)
        lines.append("│" + "│".join(text.center(width) for text in row) + "│")
    return (*lines, rule("└", "┴", "┘"))


def _list(part: Any) -> list[str]:
    return [] if part is None else [part] if isinstance(part, str) else list(part)


def _index(axes: list[str], at: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    index = 0
    for name in axes:
        index = index * sizes[name] + at[name]
    return index


def _devices(mesh: Any) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields where each device is in a mesh of nested lists, and its number."""
    pending: list[tuple[tuple[int, ...], Any]] = [((), mesh)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, list):
            pending += [((*place, n), inner) for n, inner in enumerate(value)]
        else:
            yield place, value["id"]
