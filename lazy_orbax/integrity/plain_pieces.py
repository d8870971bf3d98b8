"""Pieces that are stored as they lie in memory, compared with few large reads and no array opened.

It only ever says of a piece that it is what was saved: what else it is, and where, is for who opens
its array to say.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lazy_orbax.integrity.array_format import ArrayFormat, formats_of
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.integrity.digest_file import LeafDigests
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import Run, coalesced
from lazy_orbax.plan.runs import runs
from lazy_orbax.trust.contents import Contents
from lazy_orbax.trust.ocdbt_nodes import Extent

# Pieces that are looked at at once, and most of a read.
_BATCH_BYTES, _BATCH_PIECES, _RUN_BYTES = 2**26, 4096, 2**22
_GAP_BYTES = 2**16


class Piece(NamedTuple):
    """A piece that was saved, and its digest."""

    leaf: str
    box: Box
    digest: int


class PlainPieces:
    """Where the pieces of an item are stored as they lie in memory."""

    def __init__(self, contents: Contents, driver: str):
        """Finds out how its arrays are stored.

        Args:
            contents: what the item holds.
            driver: TensorStore's name of the format in which they were saved.
        """
        self._values = contents.values or {}
        self._kvstore = contents.files.place.kvstore
        try:
            forms = formats_of(contents)
        except ValueError:  # Who opens them says so.
            forms = {}
        plain = {name: form for name, form in forms.items() if form.is_plain}
        self._forms = {name: form for name, form in plain.items() if form.driver == driver}

    def without_good(
        self, pieces: Iterable[Piece], leaves: dict[str, LeafDigests]
    ) -> Iterator[Piece]:
        """Yields the pieces that are not known to be what was saved, in order.

        Args:
            pieces: of this item.
            leaves: what was saved of each leaf, by its name.
        """
        for batch in runs(pieces, self._bytes_of, _BATCH_BYTES, _BATCH_PIECES):
            good = self._good(batch, leaves)
            yield from (piece for piece, is_good in zip(batch, good, strict=True) if not is_good)

    def _bytes_of(self, piece: Piece) -> int:
        form = self._forms.get(piece.leaf)
        return 0 if form is None else form.chunk_bytes

    def _good(self, batch: Sequence[Piece], leaves: dict[str, LeafDigests]) -> list[bool]:
        good = [False] * len(batch)
        by_file: dict[str, list[tuple[int, Extent]]] = collections.defaultdict(list)
        for n, piece in enumerate(batch):
            form = self._forms.get(piece.leaf)
            value = None if form is None else self._value_of(piece, form, leaves[piece.leaf])
            if isinstance(value, Extent):
                by_file[value.file].append((n, value))
            elif value is not None and form is not None:
                good[n] = _fits(value, form, piece)
        for file, members in by_file.items():
            for run, content in self._reading(file, [extent for _, extent in members]):
                for n, extent in (members[i] for i in run.members):
                    start = extent.offset - run.start
                    found = content[start : start + extent.length]
                    good[n] = _fits(found, self._forms[batch[n].leaf], batch[n])
        return good

    def _value_of(self, piece: Piece, form: ArrayFormat, leaf: LeafDigests) -> Any:
        """Returns the value of a piece, or where it is, if it is one whole chunk."""
        is_as_saved = form.shape == leaf.shape and form.dtype.name == leaf.dtype
        if not is_as_saved or piece.box.shape != form.chunk:
            return None
        places = [divmod(a, n) for a, n in zip(piece.box.start, form.chunk, strict=True)]
        if any(rest for _, rest in places) or form.chunk_bytes > _BATCH_BYTES:
            return None
        return self._values.get(f"{piece.leaf}/{form.key(tuple(at for at, _ in places))}")

    def _reading(self, file: str, extents: Sequence[Extent]) -> Iterator[tuple[Run, memoryview]]:
        """Yields what could be read of a file, in runs of neighbours."""
        places = [(extent.offset, extent.length) for extent in extents]
        limits = {"gap_bytes": _GAP_BYTES, "most_bytes": _RUN_BYTES, "most_members": len(places)}
        try:
            found = list(coalesced(places, **limits))
            parts = [slice(run.start, run.stop) for run in found]
            reading = [self._kvstore.read(file, byte_range=part) for part in parts]
            for run, one in zip(found, reading, strict=True):
                read = one.result()
                if read.state == "value":
                    yield run, memoryview(bytes(read.value))
        except (ValueError, OSError):  # Who opens the arrays says what it is.
            return


def _fits(value: bytes | memoryview, form: ArrayFormat, piece: Piece) -> bool:
    """Whether a value is what was saved, and what follows it."""
    n_bytes = form.chunk_bytes
    return (
        len(value) == n_bytes + len(form.tail)
        and value[n_bytes:] == form.tail
        and digest_of_bytes(value[:n_bytes]) == piece.digest
    )
