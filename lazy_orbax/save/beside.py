"""What takes the pieces of a save beside storage, or in its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from lazy_orbax.plan.slabs import Piece, Slab


class Beside(Protocol):
    """Takes pieces. It raises nothing: storage must not fail for it."""

    def put(self, piece: Piece, view: np.ndarray) -> None:
        """Copies a piece, whose memory is used again after that."""

    def finish(self) -> None:
        """Is told that all pieces have come."""

    def end(self, why: BaseException | None) -> None:
        """Is told that no more come, and why; what is not finished never will be."""


class PiecesBeside:
    """A `Writer` that hands pieces to a `Beside`, and has nothing to wait for."""

    gives_up = True

    def __init__(self, beside: Beside):
        self._beside = beside

    def write(self, pieces: Iterable[tuple[Piece, np.ndarray]]) -> list[Any]:
        """Hands pieces over."""
        for piece, view in pieces:
            self._beside.put(piece, view)
        return []

    def wait(self, requests: Sequence[Any], slab: Slab | None = None) -> None:
        """Returns: they were copied."""
