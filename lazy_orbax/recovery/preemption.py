"""The last save of a job that is told to end: as fast as the storage takes it, in time or not.

A cloud machine that is taken away gets SIGTERM first, and perhaps half a minute. One process
notices that here; of several JAX itself does, and lets them agree on the step after which to stop.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

from lazy_orbax import _machine
from lazy_orbax._jax_context import of_this_thread
from lazy_orbax._orbax.v1_checkpointer import as_manager, manager_in
from lazy_orbax.errors import OptionError
from lazy_orbax.storage import threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastSave:
    """What became of the last save.

    Attributes:
        step: the step that was to be saved.
        committed: whether Orbax published it in time.
        taken_s: seconds that it took, with waiting for what was in flight.
        in_flight: the step that was being saved when the last save was asked for, or `None`.
        newest_step: the newest step that is committed, or `None`.
        error: why it was not committed, or `None`.
    """

    step: int
    committed: bool
    taken_s: float
    in_flight: int | None
    newest_step: int | None
    error: BaseException | None = None


class Preemption:
    """Notices that the job is to end, and makes saves urgent from then on.

    Use it as a context manager around the training loop. SIGTERM no longer ends the process:
    leave the loop when `reached` is true.
    """

    def __init__(self, *, grace_s: float = 30.0):
        """Installs nothing yet.

        Args:
            grace_s: how long after the notice the process may go on.

        Raises:
            OptionError: `grace_s` is not a positive number.
        """
        if isinstance(grace_s, bool) or not isinstance(grace_s, int | float) or not grace_s > 0:
            raise OptionError(f"grace_s={grace_s!r} must be a positive number of seconds.")
        self._grace_s = grace_s
        self._noticed_at_s: float | None = None
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Preemption:
        """Installs a handler of SIGTERM, where JAX has none and this is the main thread."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and not _jax_notices():
            previous = signal.getsignal(signal.SIGTERM)

            def on_sigterm(number: int, frame: FrameType | None) -> None:
                self.notice()
                if callable(previous):
                    previous(number, frame)

            signal.signal(signal.SIGTERM, on_sigterm)
            # `None` is a handler that is not of Python, and cannot be put back from here.
            self._restore.callback(signal.signal, signal.SIGTERM, previous or signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts back the handler that was there, and saves are as they were."""
        # First the handlers: a notice that comes in between must not leave saves urgent.
        self._restore.close()
        _machine.hurry(on=False)

    def notice(self) -> None:
        """Tells that the job is to end. For notices that do not come as SIGTERM.

        Only sets flags, so that a signal handler may call it.
        """
        if self._noticed_at_s is None:
            self._noticed_at_s = time.monotonic()
        _machine.hurry()

    @property
    def noticed(self) -> bool:
        """Whether this process knows that the job is to end. Saves are urgent then."""
        return self._noticed_at_s is not None

    def reached(self, manager: Any, step: int) -> bool:
        """Whether this is the step after which to save and leave. Ask at every step.

        With several processes, JAX lets them agree on a step, and this is true on all of them at
        that step. From the first call on, `manager.reached_preemption` asks JAX about steps in
        ascending order only, and makes saves urgent once it is true.

        Args:
            manager: an `ocp.CheckpointManager`, or a `training.Checkpointer` of v1.
            step: the step that was just done.
        """
        manager = manager_in(manager)
        if jax.process_count() == 1:
            return manager.reached_preemption(step) or self.noticed
        if not isinstance(manager.reached_preemption, _Forwards):
            ask = manager.reached_preemption
            manager.reached_preemption = _Forwards(ask, self.notice)
            self._restore.callback(setattr, manager, "reached_preemption", ask)
        return manager.reached_preemption(step)

    def last_save(self, manager: Any, step: int, *, args: Any) -> LastSave:
        """Saves a step without any limit of speed, and waits for it, but not beyond the deadline.

        If this step is being saved already, or is saved, it is not saved again. What else is in
        flight is finished first.

        Args:
            manager: an `ocp.CheckpointManager`, or a `training.Checkpointer` of v1.
            step: the step that was just done.
            args: of `manager.save`; of v1 the checkpointables, such as `{"state": state}`.

        Returns:
            What became of it. Nothing is raised. Where it is not committed because the deadline
            came first, it may be yet, while the process lives.
        """
        self.notice()
        manager = as_manager(manager)
        _machine.raise_priority()
        start_s = time.monotonic()
        assert self._noticed_at_s is not None
        left_s = self._noticed_at_s + self._grace_s - start_s
        in_flight = manager.latest_step() if manager.is_saving_in_progress() else None
        as_here = of_this_thread()

        def save() -> None:
            with contextlib.suppress(Exception):  # It is not of this step, or is seen below.
                manager.wait_until_finished()
            if step not in manager.all_steps():
                with as_here():
                    manager.save(step, args=args, force=True)
                manager.wait_until_finished()

        # Not here, because storage that hangs must not keep the process from ending.
        run = functools.partial(contextvars.copy_context().run, save)
        # If the deadline comes first the thread goes on, and dies with the process.
        saving = threads.run(run, "lazy_orbax-last-save")
        try:
            error = saving.exception(max(0.0, left_s))
        except TimeoutError:
            error = TimeoutError(f"step {step} was not committed within {self._grace_s:g} s")
        if saving.done():
            with contextlib.suppress(Exception):  # Orbax tells every thread of a failure once.
                manager.wait_until_finished()
            manager.reload()
        steps = [s for s in manager.all_steps() if saving.done() or s not in (step, in_flight)]
        return LastSave(
            step=step,
            committed=step in steps,
            taken_s=time.monotonic() - start_s,
            in_flight=in_flight,
            newest_step=max(steps, default=None),
            error=None if step in steps else error,
        )


class _Forwards:
    """Asks JAX whether the step agreed on is reached, for no step before the newest asked for.

    JAX takes the step that a process asked for *last* for where it is, and lets all agree on the
    one after the furthest. Orbax asks for an old step too, in the thread that ends its save: were
    that told to JAX, a process ahead of the others could be past the step that is agreed on, and
    would wait for ever for those that have left.

    Invariant, under the lock: JAX was asked for `_newest` last, and said yes to `_agreed` only.
    """

    def __init__(self, ask: Callable[[int], bool], on_agreed: Callable[[], None]):
        self._ask, self._on_agreed = ask, on_agreed
        self._newest: int | None = None
        self._agreed: int | None = None
        self._lock = threading.Lock()

    def __call__(self, step: int) -> bool:
        with self._lock:
            if self._newest is None or step >= self._newest:
                self._newest = step
                if self._ask(step):
                    self._agreed = step
                    # Here, because Orbax asks in `save()`, and waits then for the save before.
                    self._on_agreed()
            return step == self._agreed


def _jax_notices() -> bool:
    """Whether JAX has a handler of SIGTERM, which ours would replace."""
    enabled = getattr(jax.config, "jax_enable_preemption_service", True)
    return jax.distributed.is_initialized() and bool(enabled)
