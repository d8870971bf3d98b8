"""The exception tree, grouped by what the caller does next.

| class | the caller |
|---|---|
| `OptionError` | fixes an option, a keyword or the directory |
| `TreeError`, `DeletedArrayError` | fixes the tree that was to be saved; nothing was written |
| `SaveError` | goes on training; the last committed step is untouched, the next save may work |
| `NotDurableError` | the same; the step is listed, but only a later one will survive a power cut |
| `RestoreError` | fixes the restore target, or the checkpoint |
"""

from __future__ import annotations

from collections.abc import Sequence

_MOST_SHOWN = 10


class LazyOrbaxError(Exception):
    """Base of every error that lazy_orbax raises itself."""


class OptionError(LazyOrbaxError, ValueError):
    """An option is out of range or of the wrong type, or Orbax cannot write to a directory."""


class TreeError(LazyOrbaxError, ValueError):
    """The tree cannot be saved as it is. Nothing was written."""


class DeletedArrayError(TreeError, RuntimeError):
    """An array was deleted (usually donated) before `save()` was called. Nothing was written."""


class SaveError(LazyOrbaxError, RuntimeError):
    """A save failed after it was enqueued. The last committed step is untouched.

    Attributes:
        step: the step that failed, where the path tells it.
        directory: the item's directory.
        leaf: the leaves that were being written, as Orbax names them.
        file: the file or key the storage named, if it named one.
        process: the process that failed, where there are several; it need not be this one.
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
    """What was asked for does not fit what the checkpoint holds. Nothing was changed."""


class StockFallbackWarning(UserWarning):
    """lazy_orbax saves the stock way, because this Orbax is not one that it knows."""


def summarize(problems: Sequence[str]) -> str:
    """Returns all `problems` as one indented text, the first ten in full."""
    shown = [f"\n  {problem}" for problem in problems[:_MOST_SHOWN]]
    if len(problems) > _MOST_SHOWN:
        shown.append(f"\n  and {len(problems) - _MOST_SHOWN} more")
    return "".join(shown)
