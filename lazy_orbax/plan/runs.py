"""What is read or packed together: so many in a row, and so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def runs(
    members: Iterable[_T], bytes_of: Callable[[_T], int], most_bytes: int, most: int
) -> Iterator[list[_T]]:
    """Cuts `members` into runs, in order.

    Args:
        members: what to cut.
        bytes_of: the bytes of a member.
        most_bytes: most bytes of a run, unless one member has more.
        most: most members of a run.
    """
    run: list[_T] = []
    run_bytes = 0
    for member in members:
        n_bytes = bytes_of(member)
        if run and (run_bytes + n_bytes > most_bytes or len(run) == most):
            yield run
            run, run_bytes = [], 0
        run.append(member)
        run_bytes += n_bytes
    if run:
        yield run
