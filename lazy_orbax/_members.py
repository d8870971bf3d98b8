"""The members of a set that other threads change."""

from __future__ import annotations

import contextlib
import weakref
from typing import TypeVar

_T = TypeVar("_T")


def members_of(living: weakref.WeakSet[_T]) -> list[_T]:
    """Returns who is in a set now. Other threads may add and discard meanwhile.

    It takes no lock: it may be called in a signal handler, and in a forked child.
    """
    while True:
        with contextlib.suppress(RuntimeError):  # Somebody came while this looked.
            return list(living)
