"""How a save ends: merged, synced, published by Orbax; or, at the end of the handler, given up."""

from __future__ import annotations

from typing import Any

from lazy_orbax import _paths
from lazy_orbax._orbax.interrupted import await_interrupted
from lazy_orbax.integrity import step_metadata
from lazy_orbax.integrity.proof import stop_preparing
from lazy_orbax.recovery import cleaning
from lazy_orbax.recovery.attempt import Fate
from lazy_orbax.save.begin import Saver
from lazy_orbax.save.publication import await_publication, publication_failed
from lazy_orbax.save.step_sync import before_publication
from lazy_orbax.snapshot.compiling import stop_compiling
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage import threads
from lazy_orbax.storage.fsync import Inode
from lazy_orbax.storage.save_error import save_error


def finish(saver: Saver, directory: Any) -> None:
    """Merges what the processes wrote, unless that was done, and syncs it. Orbax publishes it then.

    Args:
        saver: how the handler saves.
        directory: the item's directory, which is not published yet.

    Raises:
        SaveError: the storage refused it, or did nothing for too long.
    """
    place, path = _paths.final(str(directory)), str(directory)
    here = [c for c in saver.commits if c.save.recorder.timeline.directory == place]
    publication = await_publication([commit.save.recorder for commit in here])
    saver.publications.add(publication)
    try:
        if not (here and here[-1].part.fate is Fate.MERGED):
            saver.merge(directory)
        # Who writes leaves of ours with a type handler of their own may be late.
        synced = [commit.save.synced_directories for commit in here if not commit.others]
        timeout_s = saver.options.storage_timeout_s
        changed = step_metadata.record(path, timeout_s=timeout_s)
        unchanged = set[Inode]().union(*synced) - changed
        before_publication(publication, path, unchanged, timeout_s=timeout_s)
    except BaseException as error:
        publication_failed(error)
        raise


def end_function(saver: Saver, operation: str, error: BaseException | None) -> None:
    """Ends what a function of v1 saved, which has published the step, or given it up.

    In the thread that did, before anybody who waits for it hears of that.

    Args:
        saver: how the handler saves.
        operation: Orbax's name of the attempt.
        error: what the function fails with, if it does.

    Raises:
        NotDurableError: the step was published unheard, and cannot be synced.
    """
    parts = [c.part for c in saver.commits if c.part.attempt.operation == operation]
    if error is not None:
        publication_failed(error)
        for attempt in {part.attempt for part in parts}:
            cleaning.refuse(attempt, save_error(parts[0].directory, error))
    try:
        saver.publications.catch_up(raises=error is None)
    finally:
        for part in parts:
            cleaning.forgo(part)
            cleaning.remove_leftovers(part)
            part.recorder.end(error=error)
        saver.forget_what_is_over()


def end_all(saver: Saver) -> None:
    """Waits for what is being saved, and gives back host memory and threads.

    Raises:
        SaveError: a save failed, and nobody was told yet.
    """
    await_interrupted()
    # What is taken from the list here is ended here, also where `close` is called twice.
    commits = list(saver.commits)
    saver.commits.clear()
    errors: list[BaseException] = [*saver.publications.end()]
    errors += [error for commit in commits if (error := commit.outcome())]
    # No save of this handler is left. Those of others make again what they need of this.
    stop_preparing()
    stop_compiling()
    HOST_BUDGET.drop_idle()
    threads.dismiss_idle()
    if errors:
        raise errors[0]
