"""A `training.Checkpointer` of v1, seen as the checkpoint manager of v0 that it is made around."""

from __future__ import annotations

from typing import Any

from lazy_orbax._orbax.v1 import MISSING, ocp1


def is_of_v1(saver: Any) -> bool:
    """Whether something is a `training.Checkpointer` of v1."""
    return not MISSING and isinstance(saver, ocp1.training.Checkpointer)


def manager_in(saver: Any) -> Any:
    """Returns the manager of v0 that decides and publishes; a manager is that itself."""
    return getattr(saver, "_manager", saver) if is_of_v1(saver) else saver


def as_manager(saver: Any) -> Any:
    """Returns what saves as a manager of v0 does; a manager does itself."""
    return _Saving(saver) if is_of_v1(saver) else saver


class _Saving:
    """What a `training.Checkpointer` has for saving, by the names of v0."""

    def __init__(self, checkpointer: Any):
        self._checkpointer = checkpointer
        self.is_saving_in_progress = checkpointer.is_saving_in_progress
        self.wait_until_finished = checkpointer.wait
        self.reload = checkpointer.reload

    def save(self, step: int, *, args: Any, force: bool) -> bool:
        """Begins to save the checkpointables `args`."""
        save = self._checkpointer.save_checkpointables_async
        return save(step, args, force=force) is not None

    def all_steps(self) -> list[int]:
        """Returns its steps."""
        return [found.step for found in self._checkpointer.checkpoints]

    def latest_step(self) -> int | None:
        """Returns its latest step."""
        return max(self.all_steps(), default=None)
