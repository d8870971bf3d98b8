"""The saves of this process that are under way, for those who wait for all of them."""

from __future__ import annotations

import weakref
from typing import Protocol

from lazy_orbax._members import members_of


class Staging(Protocol):
    """A save, as far as others wait for it."""

    def wait_until_staged(self, timeout_s: float | None) -> None:
        """Waits until every byte is in host memory."""

    def fail(self, error: BaseException) -> None:
        """Ends the save with `error` as its cause."""


_IN_FLIGHT: weakref.WeakSet[Staging] = weakref.WeakSet()


def add(save: Staging) -> None:
    """Adds a save that begins."""
    _IN_FLIGHT.add(save)


def discard(save: Staging) -> None:
    """Takes a save off the list, that is staged or of whose failure was told."""
    _IN_FLIGHT.discard(save)


def saves() -> list[Staging]:
    """Returns the saves that are not staged yet, or have failed and nobody was told."""
    return members_of(_IN_FLIGHT)


def wait_until_staged(timeout_s: float | None = None) -> None:
    """Waits until every save of this process has all its bytes in host memory.

    After that the device memory that staging took is free again.

    Args:
        timeout_s: most seconds to wait for each save; `None` waits without a limit.

    Raises:
        SaveError: a save has failed.
        TimeoutError: a save is not staged yet.
    """
    for save in saves():
        save.wait_until_staged(timeout_s)
