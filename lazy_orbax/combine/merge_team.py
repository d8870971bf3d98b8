"""The processes that merge together: who has which share, and that one fails, all fail."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from lazy_orbax.errors import SaveError
from lazy_orbax.pods import consensus


class Team:
    """The processes of a job (`jax.distributed`), or this one alone. It looks up no device then.

    Attributes:
        index: this process.
        size: how many there are.
    """

    def __init__(self) -> None:
        is_job = jax.distributed.is_initialized()
        self.index = jax.process_index() if is_job else 0
        self.size = jax.process_count() if is_job else 1

    def number(self) -> int:
        """Returns a number that all of them have, and no earlier merge had."""
        mine = time.time_ns()
        return consensus.from_first([mine], most=1)[0] if self.size > 1 else mine

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Does something that all of them do, and waits until all have done it.

        Raises:
            SaveError: another process failed.
        """
        has_failed = True
        try:
            yield
            has_failed = False
        finally:
            failed = consensus.which_processes(has_failed) if self.size > 1 else []
            if failed and not has_failed:
                raise SaveError("its part of a merge failed, see its error", process=failed[0])
