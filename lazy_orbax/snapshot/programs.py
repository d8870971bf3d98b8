"""Programs that are compiled once, for all that look alike."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from lazy_orbax.plan.slabs import bits_of


class Program:
    """A program that is compiled when it is first called, or before, in whatever thread.

    It is compiled for shapes and dtypes alone: arrays of weak types, and those that are not
    committed to their devices, need no other one. Those whose layout is not the usual one do: JAX
    compiles it when it is called. Where numbers have less than a byte each, it describes the usual
    layout in two ways, and would refuse them: there it compiles what it is given.
    """

    def __init__(self, jitted: Any, stand_ins: Sequence[jax.ShapeDtypeStruct]):
        """Compiles nothing yet.

        Args:
            jitted: what `jax.jit` returned, with the shardings of its arguments and results.
            stand_ins: what its arguments look like.
        """
        self._jitted, self._stand_ins = jitted, tuple(stand_ins)
        self._lock = threading.Lock()
        in_bytes = all(_is_of_bytes(stand_in.dtype) for stand_in in stand_ins)
        self._compiled = None if in_bytes else jitted

    def __call__(self, *arguments: jax.Array) -> jax.Array:
        """Enqueues the program, under the mesh that `jitted` needs."""
        try:
            return self.compiled()(*arguments)
        except ValueError:  # It was not begun: JAX looked at the layouts first.
            return self._jitted(*arguments)

    @property
    def is_compiled(self) -> bool:
        """Whether nothing is to be compiled before it is called."""
        return self._compiled is not None

    def compiled(self) -> Any:
        """Returns what XLA made. Under `neutral`, and under the mesh that `jitted` needs."""
        if self._compiled is None:
            with self._lock:  # Who comes second waits for it: that is sooner than to begin anew.
                self._compiled = self._compiled or self.traced().lower().compile()
        return self._compiled

    def traced(self) -> Any:
        """Returns what is compiled, before it is lowered."""
        return self._jitted.trace(*self._stand_ins)


def _is_of_bytes(dtype: np.dtype) -> bool:
    return dtype.kind in "bc" or bits_of(dtype) % 8 == 0


# By how they look. A plan keeps what it uses: with the last plan the program dies, which takes some
# megabytes.
PROGRAMS: weakref.WeakValueDictionary[Hashable, Program] = weakref.WeakValueDictionary()


def shared(look: Hashable, make: Callable[[], Program]) -> Program:
    """Returns the program of all that look like this, and makes it if there is none."""
    if (found := PROGRAMS.get(look)) is None:
        found = PROGRAMS[look] = make()
    return found
