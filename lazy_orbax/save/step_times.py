"""How long training steps take beside saves: the stall, wherever it hides.

What blocks may do so in `save()` or in the step after it, which waits for a copy, or for threads
that compete with it. Seen from the loop they are the same.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable

import jax

from lazy_orbax._members import members_of
from lazy_orbax._orbax.metrics import record_stall
from lazy_orbax.timeline import Recorder

# Steps without a save by which the others are judged: the last ones.
_MOST_QUIET = 1000
# Saves that may be under way in one step; older ones began when nobody timed steps any more.
_MOST_OPEN = 100


@dataclasses.dataclass(frozen=True)
class StallReport:
    """Times of steps, in seconds. What there were none of is `None`.

    Attributes:
        n_steps: steps that were timed.
        n_saving: those of them in which a save began, or was not over yet.
        quiet_s: median of the other steps.
        saving_s: median of those with a save.
        stalls_s: for each save, or several that overlapped: how much longer the steps took in which
            it was under way than as many quiet ones; its time in `save()` is in it.
        in_save_s: for each of those, the part of it that was spent until `save()` could return.
    """

    n_steps: int
    n_saving: int
    quiet_s: float | None
    saving_s: float | None
    stalls_s: tuple[float, ...]
    in_save_s: tuple[float, ...]


class StepTimes:
    """Times steps, with and without saves. Call `tick()` once a step, always at the same place.

    A stall is also recorded as `lazy_stall_secs` through `jax.monitoring`, where Orbax's exporters
    find it.

    Where JAX dispatches steps before they are computed, one slow step may show as a slow tick some
    steps later: judge sums over a save, as `stalls_s` are.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Times nothing yet.

        Args:
            clock: returns the time in seconds.
        """
        self._clock = clock
        self._last_s: float | None = None
        self._n_quiet, self._quiet = 0, collections.deque[float](maxlen=_MOST_QUIET)
        self._saving: list[float] = []
        self._stalls: list[tuple[float, float]] = []
        # Saves that are under way, and the steps since the first of them began.
        self._open: list[Recorder] = []
        self._steps: list[float] = []
        _ALL.add(self)

    def begun(self, recorder: Recorder) -> None:
        """Notes a save that has begun."""
        self._open.append(recorder)
        del self._open[:-_MOST_OPEN]

    def tick(self) -> None:
        """Ends a step, and begins the next. The first call begins the first step."""
        now_s = self._clock()
        last_s, self._last_s = self._last_s, now_s
        if last_s is None:
            self._open.clear()
        elif self._open:
            self._steps.append(now_s - last_s)
            if all(map(_is_over, self._open)):
                self._end_save()
        else:
            self._n_quiet += 1
            self._quiet.append(now_s - last_s)

    def _end_save(self) -> None:
        if self._quiet:
            stall_s = sum(self._steps) - len(self._steps) * statistics.median(self._quiet)
            in_save_s = sum(recorder.timeline.enqueued_s or 0.0 for recorder in self._open)
            self._stalls.append((stall_s, in_save_s))
            record_stall(stall_s)
        self._saving += self._steps
        self._open.clear()
        self._steps.clear()

    def report(self) -> StallReport:
        """Returns the times so far; a save that is under way is not in them yet."""
        return StallReport(
            n_steps=self._n_quiet + len(self._saving),
            n_saving=len(self._saving),
            quiet_s=statistics.median(self._quiet) if self._quiet else None,
            saving_s=statistics.median(self._saving) if self._saving else None,
            stalls_s=tuple(stall_s for stall_s, _ in self._stalls),
            in_save_s=tuple(in_save_s for _, in_save_s in self._stalls),
        )


def _is_over(recorder: Recorder) -> bool:
    # In a job of several processes only the one that publishes the step hears of that at once.
    is_written = recorder.timeline.durable_s is not None
    return recorder.is_complete or (is_written and jax.process_count() > 1)


_ALL: weakref.WeakSet[StepTimes] = weakref.WeakSet()


def note_begun(recorder: Recorder) -> None:
    """Tells everybody who times steps that a save has begun."""
    for times in members_of(_ALL):
        times.begun(recorder)
