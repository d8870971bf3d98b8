"""Restores the newest step that can be, and says what was passed over and why."""

from __future__ import annotations

import dataclasses
import enum
import logging
from typing import Any

from etils import epath

from lazy_orbax import _paths
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import CorruptCheckpointError, OptionError, Problem, RestoreError
from lazy_orbax.integrity.verify import verify
from lazy_orbax.pods import consensus
from lazy_orbax.restore.verified import deferred

# With several processes, so many of the newest steps are tried.
_MOST_STEPS = 1024
_LOG = logging.getLogger("lazy_orbax")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A step that was passed over. It is left as it is.

    Attributes:
        step: the step, where the directory's name tells it.
        directory: where it is.
        why: what is wrong with it.
    """

    step: int | None
    directory: str
    why: str


@dataclasses.dataclass(frozen=True)
class LatestGood:
    """What `restore_latest_good` restored.

    Attributes:
        step: the step that was restored.
        value: what `CheckpointManager.restore` returned for it.
        skipped: what is newer and could not be restored, newest first.
    """

    step: int
    value: Any = dataclasses.field(repr=False)
    skipped: tuple[Skipped, ...]


class _Verdict(enum.IntEnum):
    """What becomes of a step. The highest of all processes counts."""

    GOOD = 0
    SKIP = 1
    RAISE = 2


def restore_latest_good(manager: ocp.CheckpointManager, *, args: Any = None) -> LatestGood:
    """Restores the newest step that is whole. Deletes nothing.

    It passes over corrupt, incomplete and uncommitted steps, each with a warning in the log.
    Every process must call it; they agree on the step.

    Args:
        manager: the manager whose steps are tried, newest first.
        args: what `manager.restore` takes.

    Returns:
        The step, what was restored, and what was skipped and why.

    Raises:
        OptionError: it is no manager.
        RestoreError: the target does not fit a step that is whole.
        CorruptCheckpointError: no step can be restored; each is named with the reason.
        FileNotFoundError: there is no step at all.
    """
    refuse_no_manager("restore_latest_good", manager)
    steps, skipped = _steps(manager)
    for step, directory in steps:
        with deferred() as errors:
            value = None
            try:
                value = manager.restore(step, args=args)
            except Exception as error:  # noqa: BLE001 - Judged below.
                errors.append(error)
        error = errors[0] if errors else None
        verdict = _judge(error, directory)
        agreed = _Verdict(consensus.highest(verdict))
        if agreed is _Verdict.GOOD:
            newer = [s for s in skipped if s.step is None or s.step > step]
            return LatestGood(step, value, tuple(newer))
        del value
        if agreed is _Verdict.RAISE:
            error = error or RestoreError(f"Step {step} could not be restored on another process.")
            for passed in skipped:
                error.add_note(f"Passed over: {passed.directory}: {passed.why}")
            raise error
        why = _why(error)
        _LOG.warning("Step %d is passed over: %s", step, why)
        skipped.append(Skipped(step, directory, why))
    if not skipped:
        raise FileNotFoundError(f"There is no step in {manager.directory}.")
    problems = [Problem(s.why, s.directory) for s in skipped]
    raise CorruptCheckpointError(str(manager.directory), problems, looked=True)


def refuse_no_manager(function: str, manager: Any) -> None:
    """Raises where a function that wants a checkpoint manager got something else.

    Raises:
        OptionError: it is no manager.
    """
    if not all(hasattr(manager, name) for name in ("all_steps", "directory", "reload", "restore")):
        raise OptionError(
            f"{function} takes an ocp.CheckpointManager, and found {manager!r}. Give the manager "
            "of the run: lazy_orbax.standard_handler() or pytree_handler() as its item_handlers."
        )


def _why(error: Exception | None) -> str:
    if error is None:
        return "another process could not restore it"
    if isinstance(error, CorruptCheckpointError):
        first, *more = error.problems
        return f"{first}" + (f"; and {len(more)} more problems" if more else "")
    return f"{type(error).__name__}: {error}"


def _judge(error: Exception | None, directory: str) -> _Verdict:
    """Tells a broken step from a mistake of the caller, and from trouble of this machine."""
    if error is None:
        return _Verdict.GOOD
    if isinstance(error, CorruptCheckpointError):
        return _Verdict.SKIP
    if isinstance(error, RestoreError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return _Verdict.RAISE
    try:
        report = verify(directory)
    except (OptionError, OSError):
        return _Verdict.SKIP
    # Where all of it is known to be right, the step is not to blame.
    all_covered = all(item.is_covered and not item.not_covered for item in report.items)
    return _Verdict.RAISE if report.is_whole and all_covered else _Verdict.SKIP


def _steps(manager: ocp.CheckpointManager) -> tuple[list[tuple[int, str]], list[Skipped]]:
    """Returns the committed steps, newest first, and what else looks like a step."""
    manager.reload()
    listed = consensus.from_first(sorted(manager.all_steps(), reverse=True), most=_MOST_STEPS)
    root = epath.Path(manager.directory)
    directories, skipped = {}, []
    for path, step, is_temporary in reversed(_paths.steps_in(root)) if root.exists() else ():
        if step in listed and not is_temporary:
            directories[step] = str(path)
        elif is_temporary or path.is_dir():
            skipped.append(Skipped(step, str(path), "it was never committed"))
    return [(step, directories.get(step, str(root / str(step)))) for step in listed], skipped
