"""Saves that go the stock way in a process that saves lazily: the first of them warns."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

from lazy_orbax._orbax.entry_points import note_stock_saves
from lazy_orbax._orbax.handed_in import path_of
from lazy_orbax._orbax.lifecycle import operation_id
from lazy_orbax.errors import StockSaveWarning


class StockSaves:
    """What went the stock way.

    Orbax is asked to tell of such saves once in a process.

    Invariant, under the lock: `n_saves` were told of; the two steps are those of the last lazy save
    and of the last one that went the stock way by a handler that Orbax made; `has_warned` is set
    before a warning.

    Attributes:
        n_saves: how many there were since the first lazy handler, or `install()`.
        is_installed: whether all saves are meant to be lazy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_told, self._has_warned = False, False
        self._lazy, self._stock = ("", ""), ("", "")
        self.n_saves, self.is_installed = 0, False

    def watch(self) -> None:
        """Has Orbax tell of them from now on. A second call does nothing."""
        with self._lock:
            is_told, self._is_told = self._is_told, True
        if not is_told:
            note_stock_saves(self._note)

    def note_lazy(self, directory: Any) -> None:
        """Notes that a lazy save begins.

        Args:
            directory: of the item, as Orbax hands it in.
        """
        with self._lock:
            self._lazy = _step_of(directory)
            mixed = self._lazy == self._stock
        if mixed:
            self._warn()

    def set_installed(self, *, is_installed: bool) -> None:
        """Notes whether all saves are meant to be lazy from now on."""
        with self._lock:
            if is_installed and not self.is_installed:
                self._has_warned, self.n_saves = False, 0
            self.is_installed = is_installed

    def _note(self, directory: Any, is_made_by_orbax: bool) -> None:
        step = _step_of(directory)
        with self._lock:
            self.n_saves += 1
            if is_made_by_orbax:  # Else somebody has chosen the stock way for this item.
                self._stock = step
            unmeant = self.is_installed or self._lazy == step == self._stock
        if unmeant:
            self._warn()

    def _warn(self) -> None:
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if has_warned:
            return
        warnings.warn(
            "a tree is being saved the stock way, which blocks, although this process saves "
            "lazily: its handler was made before lazy_orbax.install(), or is none of lazy_orbax, "
            "or its item has no handler in item_handlers. Call lazy_orbax.install() before you "
            "make managers and checkpointers, or give that item a lazy_orbax.standard_handler(). "
            "lazy_orbax.status() counts such saves.",
            StockSaveWarning,
            stacklevel=2,
        )


def _step_of(directory: Any) -> tuple[str, str]:
    """Returns what the items of one step have in common, and those of another have not.

    A handler that is called without Orbax's checkpointer gets no operation of its own.
    """
    return operation_id(), os.path.dirname(path_of(directory))


STOCK_SAVES = StockSaves()
