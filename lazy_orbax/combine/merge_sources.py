"""The checkpoints that are merged: do they fit each other, and what becomes of each leaf?"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax._orbax.stored_kinds import EMPTY
from lazy_orbax.errors import MergeError, OptionError
from lazy_orbax.integrity import digest_file
from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.integrity.sidecar_files import string_at
from lazy_orbax.plan.boxes import Shape
from lazy_orbax.restore.opened import refuse_unstored
from lazy_orbax.restore.transformed import Checkpoint
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.trust.tree_file import Tree

_STRING, _ARRAY = "string", "array"
_WIDE = (np.dtype(np.float64), np.dtype(np.complex128))


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """A leaf of the result, and what it is made of.

    Attributes:
        name: as Orbax names it.
        forms: how it is stored in each source.
        shape: of the array.
        dtype: of its elements in the result.
        total: dtype in which they are added up; `None` where they are not, but copied.
    """

    name: str
    forms: tuple[ArrayFormat, ...]
    shape: Shape
    dtype: np.dtype
    total: np.dtype | None

    @property
    def metadata_name(self) -> str:
        """Name of the file, below the array's own, that describes it."""
        return _paths.ZARR_V2 if self.forms[0].driver == "zarr" else _paths.ZARR_V3

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """What that says: the same as in the first source, but for the dtype.

        Raises:
            OptionError: that format cannot hold the dtype.
        """
        form = self.forms[0]
        if self.dtype == form.dtype:
            return form.metadata
        own = ("dtype", "data_type", "fill_value", "zarr_format", "node_type")
        metadata = {name: value for name, value in form.metadata.items() if name not in own}
        spec = {"driver": form.driver, "dtype": self.dtype.name, "metadata": metadata}
        store = ts.KvStore.open({"driver": "memory"}, context=ts.Context()).result()
        try:
            ts.open(spec, kvstore=store, create=True).result()
        except ValueError as error:
            raise OptionError(f"leaf {self.name} cannot be {self.dtype.name}: {error}") from error
        return json.loads(store[self.metadata_name])


class Wanted(NamedTuple):
    """What the caller wants of a merge.

    Attributes:
        dtype: of the averaged leaves; `None` is that of the sources.
        accumulator: `float32` or `float64`.
        others: the source from which all else is taken; `None`: it must be equal in all.
    """

    dtype: np.dtype | None
    accumulator: str
    others: int | None


def wanted_of(dtype: Any, accumulator: str, others: int | None, n: int) -> Wanted:
    """Checks what the caller wants.

    Raises:
        OptionError: it is out of range.
    """
    if accumulator not in ("float32", "float64"):
        raise OptionError(f"accumulator={accumulator!r} is neither 'float32' nor 'float64'.")
    is_index = isinstance(others, int) and not isinstance(others, bool)
    if others is not None and not (is_index and -n <= others < n):
        raise OptionError(f"others={others!r} must be the position of one of the {n} sources.")
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError as error:
        raise OptionError(f"dtype={dtype!r} is no dtype.") from error
    if found is not None and not _is_averaged(found):
        raise OptionError(f"dtype={found.name} holds no averages. Give one of floats.")
    return Wanted(found, accumulator, None if others is None else others % n)


def matched(sources: Sequence[Checkpoint], wanted: Wanted) -> tuple[MergedLeaf, ...]:
    """Returns the leaves of the result that are arrays, in the order of the first source's tree.

    Args:
        sources: the checkpoints.
        wanted: what the caller wants.

    Raises:
        MergeError: the sources do not fit each other.
        CorruptCheckpointError: an array is not stored as it was saved.
        MalformedCheckpointError: an array is not stored.
    """
    for source in sources:
        refuse_unstored(source)
    trees = [_tree(source) for source in sources]
    problems = [
        problem
        for i, tree in enumerate(trees[1:], 1)
        for problem in _other_leaves(trees[0], tree, i)
    ]
    problems += _strings_apart(sources, wanted)
    leaves = []
    for name, kind in trees[0].leaves.items():
        sorts = {_sort(tree.leaves.get(name, "")) for tree in trees}
        if sorts != {_ARRAY} or any(name not in tree.leaves for tree in trees):
            continue
        forms = [source.formats.get(name) for source in sources]
        if None in forms:
            problems.append(f"leaf {name}: found a {kind}, whose own type handler wrote it")
            continue
        found = _leaf(name, [form for form in forms if form is not None], sources, wanted)
        if isinstance(found, str):
            problems.append(f"leaf {name}: {found}")
        else:
            leaves.append(found)
    if problems:
        raise MergeError(problems)
    return tuple(leaves)


def strings_of(source: Checkpoint) -> dict[str, str]:
    """Returns the leaves that are strings, by name."""
    content = source.contents.files.read(_paths.STRINGS, MOST_BYTES)
    found = json.loads(content) if content else {}
    names = [name for name, kind in _tree(source).leaves.items() if kind == _STRING]
    return {name: str(string_at(found, name)) for name in names}


def digest_of_digests(source: Checkpoint) -> str | None:
    """Returns one digest of all that a source holds; `None` where it has no digests."""
    files = source.contents.files
    names = [n for n in files.names(digest_file.DIRECTORY) if "/process_" in n]
    found = 0
    for name in names:
        found = digest_of_bytes(files.read(name, MOST_BYTES) or b"", seed=found)
    return f"{found:016x}" if names else None


def _tree(source: Checkpoint) -> Tree:
    assert source.contents.tree is not None
    return source.contents.tree


def _other_leaves(first: Tree, other: Tree, i: int) -> Iterator[str]:
    """Yields in what the structure of a source differs from the first one's."""
    for name, kind in first.leaves.items():
        found = other.leaves.get(name)
        if found is None:
            yield f"leaf {name}: found in source 0, and not in source {i}"
        elif _sort(kind) != _sort(found):
            yield f"leaf {name}: found {kind} in source 0, {found} in source {i}"
    for name in other.leaves:
        if name not in first.leaves:
            yield f"leaf {name}: found in source {i}, and not in source 0"


def _sort(kind: str) -> str:
    """Arrays of NumPy and of JAX, and numbers, are alike: what is stored of them is."""
    return kind if kind in EMPTY or kind == _STRING else _ARRAY


def _leaf(
    name: str, forms: list[ArrayFormat], sources: Sequence[Checkpoint], wanted: Wanted
) -> MergedLeaf | str:
    keys = [source.contents.keys.get(name, "no key") for source in sources]
    shapes, dtypes = ([getattr(form, what) for form in forms] for what in ("shape", "dtype"))
    if text := _apart("keys of", keys) or _apart("", [list(shape) for shape in shapes]):
        return text
    first = dtypes[0]
    are_averaged = all(map(_is_averaged, dtypes))
    is_given = are_averaged and wanted.dtype is not None
    if not is_given and (text := _apart("", [dtype.name for dtype in dtypes])):
        return text + ("; give the dtype of the result" if are_averaged else "")
    if not _is_averaged(first):
        return MergedLeaf(name, tuple(forms), shapes[0], first, None)
    complex_ = [dtype for dtype in dtypes if dtype.kind == "c"]
    dtype = first if wanted.dtype is None else wanted.dtype
    if complex_ and dtype.kind != "c":
        dtype = np.result_type(*complex_)  # A real one has no room for their imaginary parts.
    is_wide = wanted.accumulator == "float64" or any(one in _WIDE for one in (*dtypes, dtype))
    total = np.result_type(
        np.float64 if is_wide else np.float32, *([np.complex64] * bool(complex_))
    )
    return MergedLeaf(name, tuple(forms), shapes[0], dtype, total)


def _apart(what: str, found: list[Any]) -> str:
    """Says where something differs from the first source's; nothing where it does not."""
    for i, one in enumerate(found):
        if one != found[0]:
            return f"found {what} {found[0]} in source 0, {one} in source {i}".replace("  ", " ")
    return ""


def _is_averaged(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, np.inexact)


def _strings_apart(sources: Sequence[Checkpoint], wanted: Wanted) -> list[str]:
    if wanted.others is not None:
        return []
    texts = [strings_of(source) for source in sources]
    return [
        f"leaf {name}: found {text[:40]!r} in source 0, {other[name][:40]!r} in source {i}"
        for name, text in texts[0].items()
        for i, other in enumerate(texts)
        if other.get(name, text) != text
    ]
