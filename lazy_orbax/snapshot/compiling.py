"""Compiles the programs that pack a plan's slabs, in the background, for its next save.

On CPU a copy costs less than to compile a program that copies. So the first save of a tree copies,
and what it would have waited for is made when its bytes are on storage.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable

from lazy_orbax._jax_context import neutral
from lazy_orbax._members import members_of
from lazy_orbax.plan.slabs import Plan, Slab
from lazy_orbax.snapshot.device_to_host import is_in_host_memory
from lazy_orbax.snapshot.pack import compile_ahead, is_compiled

_LOG = logging.getLogger("lazy_orbax")


class Compiling:
    """The thread that compiles what packs the slabs of one plan.

    Invariant, under the lock: at most one thread compiles, and none after one has failed.

    Attributes:
        has_failed: whether a program could not be compiled, which the log has told.
    """

    def __init__(self) -> None:
        self.has_failed = False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, plan: Plan, *, lower_priority: Callable[[], None]) -> None:
        """Begins to compile what is not compiled yet; where a thread was stopped, it goes on.

        Args:
            plan: the plan.
            lower_priority: called in the thread.
        """
        with self._lock:
            if self.has_failed or (self._thread is not None and self._thread.is_alive()):
                return
            wanted = [slab for slab in plan.slabs if _wants_one(plan, slab)]
            if not wanted:
                return
            # The interpreter waits for it: a compiler must not run while the process is taken down.
            thread = threading.Thread(
                target=self._compile,
                args=(plan, wanted, lower_priority),
                name="lazy_orbax-compile",
                daemon=False,
            )
            with contextlib.suppress(RuntimeError):  # No thread is to be had now: the next save.
                thread.start()
                self._thread = thread
                _RUNNING.add(self)

    def _compile(self, plan: Plan, slabs: list[Slab], lower_priority: Callable[[], None]) -> None:
        lower_priority()
        try:
            for slab in slabs:
                if self._stopped.is_set() or not threading.main_thread().is_alive():
                    return
                with neutral():
                    compile_ahead(plan, slab)
        except Exception:  # noqa: BLE001 - Saves go on; the log has it.
            self.has_failed = True
            _LOG.exception(
                "The programs that pack a tree for a save could not be compiled. Each save of it "
                "copies its arrays instead, while save() waits: it is slower, and correct."
            )

    def stop(self) -> None:
        """Ends the thread after its next program, and waits for that. A later save goes on."""
        with self._lock:
            if self._thread is not None:
                self._stopped.set()
                self._thread.join()
                self._stopped.clear()
                self._thread = None


def _wants_one(plan: Plan, slab: Slab) -> bool:
    return slab.kind == "mesh" and is_in_host_memory(slab) and not is_compiled(plan, slab)


# Whose threads may be compiling.
_RUNNING: weakref.WeakSet[Compiling] = weakref.WeakSet()


def compiling_of(plan: Plan) -> Compiling:
    """Returns what compiles for a plan."""
    return plan.kept.setdefault(Compiling, Compiling())


def stop_compiling() -> None:
    """Ends the threads that compile, and waits for that."""
    for compiling in members_of(_RUNNING):
        compiling.stop()
