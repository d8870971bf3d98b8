"""What is on storage, against its digests. No devices, no model, a bounded amount of memory."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from lazy_orbax.errors import MalformedCheckpointError, Problem
from lazy_orbax.integrity import digest, digest_file, sidecar_files
from lazy_orbax.integrity.digest_file import DigestError, LeafDigests, ProcessDigests
from lazy_orbax.integrity.digest_in_parts import PART_BYTES, digest_in_parts
from lazy_orbax.integrity.plain_pieces import Piece, PlainPieces
from lazy_orbax.integrity.step_place import wrong_step
from lazy_orbax.integrity.stored_arrays import StoredArrays
from lazy_orbax.plan.runs import runs
from lazy_orbax.storage.place import MOST_BYTES
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.contents import Contents
from lazy_orbax.trust.files import ItemFiles

# Pieces that are read at once, and how much of a large one.
_BATCH_BYTES = PART_BYTES
_BATCH_PIECES = 256
_CACHE_BYTES = 2**27


class StoredItem:
    """One saved item: its digests, and what they are of. Reads only when it is asked to.

    Attributes:
        files: its files.
        leaves: what was saved of each leaf, by its name.
        strings: digests of the leaves that are strings, by name.
        others: names of leaves that have no digest.
        problems: what is wrong with the digests themselves.
    """

    def __init__(self, directory: str, files: ItemFiles | None = None):
        """Reads the files of digests, if there are any.

        Args:
            directory: an item's directory, or its `gs://` address.
            files: what is known of its files.
        """
        place = place_of(directory)
        self.files = ItemFiles(place) if files is None else files
        cache, remote = {"total_bytes_limit": _CACHE_BYTES}, place.context_spec()
        context = ts.Context({"cache_pool": cache, "cache_pool#ocdbt": cache, **remote})
        base = ts.KvStore.open(place.kvstore_spec(), context=context).result()
        self.leaves: dict[str, LeafDigests] = {}
        self.strings: dict[str, int] = {}
        self.others: tuple[str, ...] = ()
        self.problems: list[Problem] = []
        self._wanted: dict[str, tuple[int, int]] = {}
        parts = self._read_digests()
        for part in parts:
            self._add(part)
        self.problems += filter(None, (wrong_step(part, directory) for part in parts))
        driver, use_ocdbt = (parts[-1].driver, parts[-1].use_ocdbt) if parts else ("zarr", True)
        self._arrays = StoredArrays(place, base, context, driver, use_ocdbt)

    @property
    def directory(self) -> str:
        """The item's directory, or its address."""
        return self.files.place.directory

    @property
    def is_covered(self) -> bool:
        """Whether there are digests, readable or not."""
        return bool(self.leaves or self._wanted or self.problems)

    @property
    def pieces(self) -> Iterator[Piece]:
        """Every piece that was saved."""
        for leaf in self.leaves.values():
            for box, found in zip(leaf.boxes, leaf.digests, strict=True):
                yield Piece(leaf.name, box, found)

    @property
    def n_bytes(self) -> int:
        """Size of all pieces, in bytes."""
        return sum(map(self.bytes_of, self.pieces))

    def _read_digests(self) -> list[ProcessDigests]:
        names = self.files.names(digest_file.DIRECTORY)
        names = [name for name in names if re.fullmatch(r"process_\d+", name.rpartition("/")[2])]
        self.files.read_ahead(names, MOST_BYTES)
        found: list[ProcessDigests] = []
        for file in names:
            if (size := self.files.size(file)) is None or size > MOST_BYTES:
                what = f"cannot be used: found {size} bytes, wanted at most {MOST_BYTES}"
                self.problems.append(Problem(what, file))
                continue
            try:
                found.append(digest_file.parse(self.files.read(file, MOST_BYTES) or b""))
            except (DigestError, MalformedCheckpointError) as error:
                self.problems.append(Problem(f"cannot be used: {error}", file))
        missing = {n for part in found for n in part.processes} - {part.process for part in found}
        for process in sorted(missing) if not self.problems else ():
            file = f"{digest_file.DIRECTORY}/process_{process}"
            self.problems.append(Problem("is missing; that process took part in the save", file))
        return found

    def _add(self, part: ProcessDigests) -> None:
        self._wanted |= part.files
        self.strings |= part.strings
        self.others += tuple(name for name in part.others if name not in part.strings)
        for leaf in part.leaves:
            known = self.leaves.get(leaf.name, leaf)
            if (known.dtype, known.shape) != (leaf.dtype, leaf.shape):
                file = f"{digest_file.DIRECTORY}/process_{part.process}"
                what = "differs in dtype or shape from what another process wrote"
                self.problems.append(Problem(what, file, leaf.name))
            elif known is not leaf:
                leaf = known.joined(leaf)
            self.leaves[leaf.name] = leaf

    def check_files(self) -> list[Problem]:
        """Returns what is wrong with the small files beside the arrays."""
        changed = sidecar_files.changed_files(self.files, self._wanted)
        return changed + sidecar_files.changed_strings(self.files, self.strings)

    def check_arrays(self, names: Iterable[str] | None = None) -> list[Problem]:
        """Returns which leaves are not there in the dtype and shape in which they were saved.

        Args:
            names: the leaves; `None` is all of them.
        """
        problems = []
        todo = list(self.leaves if names is None else names)
        for i in range(0, len(todo), _BATCH_PIECES):
            opening = {name: self._arrays.open(name) for name in todo[i : i + _BATCH_PIECES]}
            problems += [p for name, store in opening.items() if (p := self._misfit(name, store))]
        return problems

    def _misfit(self, name: str, opening: Any) -> Problem | None:
        leaf = self.leaves[name]
        try:
            store = opening.result()
        except (ValueError, OSError) as error:
            return Problem(f"cannot be opened: {error}", self._arrays.file_in(str(error)), name)
        found, wanted = (store.dtype.name, tuple(store.shape)), (leaf.dtype, leaf.shape)
        if found == wanted:
            return None
        what = f"found {found[0]}{list(found[1])}, saved was {wanted[0]}{list(wanted[1])}"
        return Problem(what, self._arrays.metadata_file(name), name)

    def check_pieces(
        self, pieces: Iterable[Piece], contents: Contents | None = None
    ) -> Iterator[Problem]:
        """Reads pieces again and tells which are not what was saved.

        Args:
            pieces: what to read.
            contents: what the item holds, where that is known: what is stored plainly is read
                without opening its array.
        """
        if contents is not None:
            pieces = PlainPieces(contents, self._arrays.driver).without_good(pieces, self.leaves)
        for _, found in self.read(pieces):
            if isinstance(found, Problem):
                yield found

    def read(self, pieces: Iterable[Piece], *, whole: bool = False) -> Iterator[tuple[Piece, Any]]:
        """Reads pieces, and gives for each its data, or what is wrong with it.

        Args:
            pieces: what to read.
            whole: whether the data of large ones is wanted, too. Else they are read in parts, and
                `None` stands for the data.
        """
        for batch in runs(pieces, self.bytes_of, _BATCH_BYTES, _BATCH_PIECES):
            stores = {piece.leaf: self._arrays.open(piece.leaf) for piece in batch}
            misfits = {name: self._misfit(name, store) for name, store in stores.items()}
            reading = [
                stores[piece.leaf].result()[piece.box.index].read()
                if misfits[piece.leaf] is None and (whole or self.bytes_of(piece) <= _BATCH_BYTES)
                else None
                for piece in batch
            ]
            for piece, future in zip(batch, reading, strict=True):
                if (misfit := misfits[piece.leaf]) is not None:
                    yield piece, misfit
                else:
                    yield piece, self._checked(piece, stores[piece.leaf].result(), future)

    def _checked(self, piece: Piece, store: Any, future: Any) -> np.ndarray | Problem | None:
        data = None
        try:
            if future is not None:
                data = future.result()
                found = digest.digest_of(data)
            else:
                found = digest_in_parts(store, piece.box)
        except (ValueError, OSError) as error:
            what = f"cannot be read: {error}"
            file = self._arrays.file_in(str(error)) or self.file_of(piece)
            return Problem(what, file, piece.leaf, str(piece.box))
        if found == piece.digest:
            return data
        what = f"its digest is {found:016x}, but {piece.digest:016x} was saved"
        return Problem(what, self.file_of(piece), piece.leaf, str(piece.box))

    def bytes_of(self, piece: Piece) -> int:
        """Returns the size of a piece, in bytes."""
        return math.prod(piece.box.shape) * _itemsize(self.leaves[piece.leaf].dtype)

    def file_of(self, piece: Piece) -> str | None:
        """Returns the file that holds a piece, or the first of them; `None` where none is found."""
        return self._arrays.file_of(piece.leaf, piece.box)


@functools.lru_cache(maxsize=64)
def _itemsize(dtype: str) -> int:
    return ts.dtype(dtype).numpy_dtype.itemsize
