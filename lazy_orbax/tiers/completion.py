"""What becomes of a run whose last trainer has died: its newest snapshot goes to storage.

The keeper has neither JAX nor Orbax. A program of its own writes the step, and ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys

_LOG = logging.getLogger("lazy_orbax")
# How long the keeper, for which all wait, waits for the end of a program that was killed.
_END_S = 1.0
_PROGRAM = "lazy_orbax.handlers.completing"


@dataclasses.dataclass
class _Run:
    after_s: float
    dead_since_s: float | None = None
    program: subprocess.Popen[bytes] | None = None


class Completions:
    """The runs that are to be completed when nobody is left of them.

    A run is alive, or dead since a moment, or being completed; then it is forgotten.
    """

    def __init__(self, directory: str):
        """Begins with no run.

        Args:
            directory: where the snapshots are.
        """
        self._directory = directory
        self._runs: dict[str, _Run] = {}

    @property
    def pending(self) -> list[str]:
        """The runs of which nobody is there."""
        return [name for name, run in self._runs.items() if run.dead_since_s is not None]

    def came(self, run: str, after_s: float | None) -> None:
        """Notes that a trainer is there: it goes on with the run itself.

        Args:
            run: the run.
            after_s: for how long nobody may be there before it is completed; `None`: it never is.
        """
        self._stop(self._runs.pop(run, None))
        if after_s is not None:
            self._runs[run] = _Run(float(after_s))

    def left(self, run: str | None) -> None:
        """Notes that a trainer has ended well."""
        if run is not None:
            self._stop(self._runs.pop(run, None))

    def turn(self, now_s: float, alive: set[str]) -> bool:
        """Completes what is due. Returns whether something is, or will be.

        Args:
            now_s: the moment.
            alive: runs of which somebody is there.
        """
        for name, run in list(self._runs.items()):
            if name in alive:
                run.dead_since_s = None
            elif run.program is not None:
                if (status := run.program.poll()) is not None:
                    _LOG.warning("Completing %s ended with %s.", name, status)
                    del self._runs[name]
            elif run.dead_since_s is None:
                run.dead_since_s = now_s
            elif now_s - run.dead_since_s >= run.after_s:
                try:
                    run.program = self._started(name)
                except OSError as error:  # There is no memory for one more process, perhaps.
                    run.dead_since_s = now_s
                    _LOG.warning("Nothing completes %s yet: %s", name, error)
        return any(name not in alive for name in self._runs)

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        _LOG.warning("Nobody is left of %s: its newest snapshot goes to storage.", name)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)  # Perhaps for another device.
        command = [sys.executable, "-m", _PROGRAM, name, self._directory]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)

    def _stop(self, run: _Run | None) -> None:
        if run is not None and run.program is not None:
            end(run.program)

    def close(self) -> None:
        """Stops what is being completed."""
        for run in self._runs.values():
            self._stop(run)
        self._runs.clear()


def end(program: subprocess.Popen[bytes]) -> None:
    """Kills a program. One that storage holds ends when the kernel lets it: nobody waits for that.

    Args:
        program: one that the keeper started.
    """
    program.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(_END_S)
