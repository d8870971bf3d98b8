"""What was restored, against the digests of what was saved: the arrays themselves are looked at.

Reading a file again would not tell that a bit was flipped in the one download that counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lazy_orbax import _paths
from lazy_orbax._jax_context import neutral
from lazy_orbax.errors import Problem
from lazy_orbax.integrity import digest, proof_restored
from lazy_orbax.integrity.proof_subjects import is_in_host_memory
from lazy_orbax.integrity.stored_item import Piece, StoredItem
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.runs import runs
from lazy_orbax.plan.shards import is_key
from lazy_orbax.snapshot import host_copies

# What is brought to the host at once.
_BATCH_BYTES = 2**26
_BATCH_ARRAYS = 256


@dataclasses.dataclass(frozen=True)
class _Part:
    """What this process has of a leaf: a rectangle of it, and the array that holds that."""

    leaf: str
    box: Box
    data: Any


@neutral()
def check_restored(stored: StoredItem, leaves: Mapping[str, Any]) -> list[Problem]:
    """Returns what is not as it was saved.

    Pieces that lie whole in what was restored are hashed as they are. Others are read again, and
    what was restored of them is compared with that, in the dtype in which it was restored. Where
    there are fingerprints of what was saved, arrays far from the host are looked at where they are.

    Args:
        stored: the item, with its digests.
        leaves: what was restored, by Orbax's name of the leaf. What is no array or number is not
            looked at. Nothing stays cached on the arrays.
    """
    problems: list[Problem] = []
    proven = proof_restored.look(stored.leaves, far_from_the_host(leaves))
    parts: list[_Part] = []
    again: list[_Part] = []
    for name, value in leaves.items():
        wanted = stored.strings.get(name) if isinstance(value, str) else None
        if wanted is not None and digest.digest_of_text(value) != wanted:
            problems.append(Problem("is not the string that was saved", _paths.STRINGS, name))
        if name not in stored.leaves or name in proven.right:
            continue
        saved = stored.leaves[name]
        mine = list(_parts(name, value))
        same = all(part.data.dtype.name == saved.dtype for part in mine)
        if same and mine and _shape(value) == saved.shape:
            parts += mine
        else:
            again += mine
    for part, host in _on_host(parts):
        for piece in _touching(stored, part):
            if not piece.box.is_within(part.box):
                again.append(part)  # Another process has the rest.
                break
            found = host[piece.box.relative_to(part.box)]
            if digest.digest_of(found) != piece.digest and not _was_wider(stored, piece, found):
                problems.append(explain(stored, piece))
    problems += _compare(stored, again)
    explained = {problem.leaf for problem in problems}
    what = "restored wrongly, though the storage and another replica are right"
    problems += [
        Problem(f"{what}: {where}", leaf=name)
        for name, where in proven.wrong.items()
        if name not in explained
    ]
    return problems


def far_from_the_host(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays, by name, that the host can only look at in a copy."""
    return {
        name: value
        for name, value in leaves.items()
        if isinstance(value, jax.Array) and not is_in_host_memory(value.sharding)
    }


def _parts(name: str, value: Any) -> Iterator[_Part]:
    """Returns each distinct shard of an array, or all of a NumPy array or number."""
    if isinstance(value, jax.Array):
        array = jax.random.key_data(value) if is_key(value) else value
        seen = set()
        for shard in array.addressable_shards:
            start = tuple(part.start or 0 for part in shard.index)
            if start not in seen and math.prod(shard.data.shape):
                seen.add(start)
                yield _Part(name, Box(start, shard.data.shape), shard.data)
    elif isinstance(value, np.ndarray | np.generic | bool | int | float | complex):
        array = np.asarray(value)
        yield _Part(name, Box((0,) * array.ndim, array.shape), array)


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, jax.Array) and is_key(value):
        return jax.eval_shape(jax.random.key_data, value).shape
    return np.shape(value)


def _on_host(parts: Iterable[_Part]) -> Iterator[tuple[_Part, np.ndarray]]:
    """Yields parts in host memory. What is not there is brought, some at a time."""
    elsewhere = []
    for part in parts:
        is_array = isinstance(part.data, jax.Array)
        host = host_copies.view_of(part.data) if is_array else part.data
        if host is None:
            elsewhere.append(part)
        else:
            yield part, host
    for batch in runs(elsewhere, lambda part: part.data.nbytes, _BATCH_BYTES, _BATCH_ARRAYS):
        copies = host_copies.enqueue([part.data for part in batch])
        for part, ours in zip(batch, copies, strict=True):
            (host,) = host_copies.shards_of(ours).values()
            yield part, host


def _touching(stored: StoredItem, part: _Part) -> Iterator[Piece]:
    """Returns the pieces that have something of a part."""
    for box, found in stored.leaves[part.leaf].touching(part.box):
        yield Piece(part.leaf, box, found)


def explain(stored: StoredItem, piece: Piece) -> Problem:
    """Finds out whether the storage is wrong, or only what was read from it."""
    for problem in stored.check_pieces([piece]):
        return problem
    what = "restored wrongly, though the storage holds it right: it changed on the way here"
    return Problem(what, stored.file_of(piece), piece.leaf, str(piece.box))


def _was_wider(stored: StoredItem, piece: Piece, found: np.ndarray) -> bool:
    """Whether an array is what is stored, but for NaNs that a wider dtype on the way made quiet.

    Orbax goes that way where float64 is asked for, and JAX has only float32.
    """
    wider = {"float32": "float64", "complex64": "complex128"}.get(found.dtype.name)
    if wider is None or not np.isnan(found).any():
        return False
    ((_, data),) = stored.read([piece], whole=True)
    if isinstance(data, Problem):
        return False
    quiet = digest.cast(digest.cast(data, wider), found.dtype.name)
    return bool((digest.bytes_of(quiet) == digest.bytes_of(found)).all())


def _compare(stored: StoredItem, parts: Iterable[_Part]) -> Iterator[Problem]:
    """Reads the pieces of parts again, and compares them with the parts."""
    for part in parts:
        pieces = list(_touching(stored, part))
        ((_, host),) = _on_host([part])
        for piece, data in stored.read(pieces, whole=True):
            if isinstance(data, Problem):
                yield data
            elif not _is_same(data, piece.box, host, part.box):
                yield Problem(
                    f"restored as {host.dtype} it differs from what the storage holds: it changed "
                    "on the way here",
                    stored.file_of(piece),
                    piece.leaf,
                    str(piece.box.overlap(part.box)),
                )


def _is_same(data: np.ndarray, box: Box, host: np.ndarray, part: Box) -> bool:
    """Whether two arrays hold the same where their boxes overlap, but for the dtype."""
    common = box.overlap(part)
    assert common is not None
    wanted, found = data[common.relative_to(box)], host[common.relative_to(part)]
    if host.dtype == object:  # A number of Python's that no dtype of NumPy's holds.
        return int(float(wanted)) == found
    if wanted.dtype != found.dtype:
        try:
            wanted = digest.cast(np.ascontiguousarray(wanted), found.dtype.name)
        except (ValueError, TypeError):
            return True  # TensorStore has no such cast, so Orbax did not read it that way.
    equal = digest.bytes_of(wanted) == digest.bytes_of(found)
    if equal.all() or found.dtype == data.dtype:
        return bool(equal.all())
    # What a cast makes of a NaN, or of what does not fit, is not the same everywhere.
    nans = np.array([x != x for x in (wanted, found)]).all(axis=0)
    outside = found.dtype.kind in "iub" and data.dtype.kind not in "iub"
    return outside or bool(((wanted == found) | nans).all())
