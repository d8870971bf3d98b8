"""The exception tree, grouped by what the caller does next.

| class | the caller |
|---|---|
| `OptionError` | fixes an option, a keyword or the directory |
| `TreeError`, `DeletedArrayError` | fixes the tree that was to be saved; nothing was written |
| `SaveError` | goes on training; the last committed step is untouched, the next save may work |
| `NotDurableError` | the same; the step is listed, but only a later one will survive a power cut |
| `RestoreError` | fixes the restore target |
| `TransformError` | fixes the rules by which a restore transforms what is stored |
| `MergeError` | merges checkpoints that fit each other, or says what is to be taken from one |
| `CorruptCheckpointError` | takes an older step: this one is not what was saved |
| `MissingFileError` | the same, or copies the checkpoint again: a file of it is gone |
| `MalformedCheckpointError` | restores another checkpoint; nobody should trust this one |
| `KeeperError` | trains without snapshots in memory, or gives the keeper what it needs |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

_MOST_SHOWN = 10


class LazyOrbaxError(Exception):
    """Base of every error that lazy_orbax raises itself."""


class OptionError(LazyOrbaxError, ValueError):
    """An option is out of range or of the wrong type, or Orbax cannot write to a directory."""


class TreeError(LazyOrbaxError, ValueError):
    """The tree cannot be saved as it is. Nothing was written."""


class DeletedArrayError(TreeError, RuntimeError):
    """An array was deleted (usually donated) before `save()` was called. Nothing was written."""


MAIN_THREAD_ENDED = (
    "the main thread had ended, after which Python runs nothing in the background. Call "
    "wait_until_finished(), and join the threads that save, before the main thread ends"
)
"""Why a save fails that goes on when the main thread does not."""


class SaveError(LazyOrbaxError, RuntimeError):
    """A save failed after it was enqueued. The last committed step is untouched.

    Attributes:
        step: the step that failed, where the path tells it.
        directory: the item's directory.
        leaf: the leaves that were being written, as Orbax names them.
        file: the file or key the storage named, if it named one.
        process: the process that failed, if there are several. Perhaps it is another one.
        errno: the operating system's number of the error, such as `errno.ENOSPC`, where it has one.
        what: what went wrong there.
        outcome: what that means for the step.
    """

    outcome = "This step was not committed and earlier ones are untouched; mend the cause and save"

    def __init__(
        self,
        what: str,
        *,
        step: int | None = None,
        directory: str | None = None,
        leaf: str | None = None,
        file: str | None = None,
        process: int | None = None,
    ):
        self.step, self.directory, self.leaf, self.file = step, directory, leaf, file
        self.process, self.what = process, what
        self.errno: int | None = None
        places = [
            f"process {process}" if process is not None else "",
            f"step {step}" if step is not None else "",
            f"leaf {leaf}" if leaf else "",
            f"file {file}" if file else "",
            f"directory {directory}" if directory else "",
        ]
        where = ", ".join(place for place in places if place)
        where = f" ({where})" if where else ""
        super().__init__(f"Saving failed{where}: {what}. {self.outcome} again.")


class NotDurableError(SaveError):
    """A step was published, but the storage refused to sync that: a power cut may undo it."""

    outcome = (
        "This step is listed, but a power cut may lose it; earlier ones are untouched. Mend the "
        "cause and save"
    )


class RestoreError(LazyOrbaxError, ValueError):
    """The restore target does not fit what the checkpoint holds. Nothing was changed."""


class TransformError(RestoreError):
    """The rules of a restore do not make the wanted leaves from the stored ones. Nothing was read.

    Attributes:
        problems: everything wrong that was found, by leaf or by rule.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        listed = summarize(problems)
        super().__init__(f"The transforms do not make what is wanted from what is stored:{listed}")


class MergeError(LazyOrbaxError, ValueError):
    """Checkpoints do not fit each other, so they have no merge. Nothing is left of it.

    Attributes:
        problems: every misfit that was found, by leaf.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(f"These checkpoints cannot be merged:{summarize(problems)}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something of a checkpoint that is not what was saved.

    Attributes:
        what: what was found, and what was wanted.
        file: the file or key, below the item's directory where it has no path of its own.
        leaf: the leaf, as Orbax names it, where it is one leaf's.
        index: the range of that leaf, such as `[0:4, 8:16]`.
    """

    what: str
    file: str | None = None
    leaf: str | None = None
    index: str | None = None

    def __str__(self) -> str:
        leaf = f"leaf {self.leaf}{self.index or ''}" if self.leaf is not None else ""
        where = ", ".join(part for part in (leaf, f"file {self.file}" if self.file else "") if part)
        return f"{where}: {self.what}" if where else self.what


class CorruptCheckpointError(LazyOrbaxError, ValueError):
    """A checkpoint is not what was saved. Nothing of it was handed out, and nothing was changed.

    Attributes:
        directory: the item's directory.
        problems: everything wrong that was found.
        leaf: the leaf of the first problem, as Orbax names it.
        index: the range of that leaf.
        file: the file of the first problem.
        newest_whole_step: the newest other step that is whole, if a search found one.
    """

    def __init__(
        self,
        directory: str,
        problems: Sequence[Problem],
        *,
        newest_whole_step: int | None = None,
        looked: bool = False,
    ):
        self.directory, self.problems = directory, tuple(problems)
        first = self.problems[0]
        self.leaf, self.index, self.file = first.leaf, first.index, first.file
        self.newest_whole_step = newest_whole_step
        if newest_whole_step is not None:
            advice = f"The newest step that is whole is {newest_whole_step}; restore that."
        elif looked:
            advice = "No other step here is known to be whole."
        else:
            advice = (
                "Restore another step. Not all were looked at: `lazy-orbax verify` tells "
                "which are whole."
            )
        listed = summarize(list(map(str, problems)))
        super().__init__(f"The checkpoint {directory} is not what was saved:{listed}\n{advice}")


class MissingFileError(CorruptCheckpointError, FileNotFoundError):
    """A file of a checkpoint is gone, where Orbax too says that a file was not found."""


class MalformedCheckpointError(LazyOrbaxError, ValueError):
    """A checkpoint is not one that Orbax wrote, or is dangerous to restore. Nothing was restored.

    Attributes:
        file: the file or directory at fault.
        found: what is there.
        wanted: what should be.
    """

    def __init__(self, file: Any, found: str, wanted: str):
        self.file, self.found, self.wanted = str(file), found, wanted
        super().__init__(
            f"{file}: found {found}, wanted {wanted}. The checkpoint is malformed: restore another "
            "step, or get this one again from where it was written."
        )

    @property
    def problem(self) -> Problem:
        """What is wrong, without advice."""
        return Problem(f"found {self.found}, wanted {self.wanted}", self.file)

    @classmethod
    def of(cls, file: Any, problems: Sequence[str]) -> MalformedCheckpointError:
        """Returns the error of a file with several things wrong, each said in full."""
        found = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        return cls(file, found, f"none of these:{summarize(problems)}\n")


class KeeperError(LazyOrbaxError, RuntimeError):
    """A keeper of snapshots in memory cannot be had, or refused something."""


class StockFallbackWarning(UserWarning):
    """This version of Orbax is unknown to lazy_orbax, which therefore saves the stock way."""


class StockSaveWarning(UserWarning):
    """A tree was saved the stock way, where lazy_orbax was asked to save lazily."""


def summarize(problems: Sequence[str]) -> str:
    """Returns all `problems` as one indented text, the first ten in full."""
    shown = [f"\n  {problem}" for problem in problems[:_MOST_SHOWN]]
    if len(problems) > _MOST_SHOWN:
        shown.append(f"\n  and {len(problems) - _MOST_SHOWN} more")
    return "".join(shown)
