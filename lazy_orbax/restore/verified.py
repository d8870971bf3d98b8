"""A restore, by plan or by Orbax: verified, and agreed on."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lazy_orbax._machine import without_garbage_collection
from lazy_orbax._orbax import metrics
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    Problem,
    RestoreError,
)
from lazy_orbax.integrity import digest_file, step_metadata
from lazy_orbax.integrity.stored_item import StoredItem
from lazy_orbax.integrity.verify import raise_corrupt
from lazy_orbax.pods import consensus
from lazy_orbax.restore.compare_arrays import check_restored, explain
from lazy_orbax.restore.either_way import Question, restore_either_way
from lazy_orbax.restore.misfits import explained
from lazy_orbax.storage import threads
from lazy_orbax.timeline import RestoreRecorder
from lazy_orbax.trust.contents import Contents
from lazy_orbax.trust.malformed import checked

# Where it is set, what goes wrong is put there, and not raised: the other processes are in the
# middle of the restore, and this one must go through it too.
_DEFERRED: contextvars.ContextVar[list[Exception] | None] = contextvars.ContextVar(
    "lazy_orbax_deferred", default=None
)
STAGING_BYTES = 96 * 10**9
"""Orbax's own limit of what only passes through host memory, in bytes."""
_LOG = logging.getLogger("lazy_orbax")


@contextlib.contextmanager
def deferred() -> Iterator[list[Exception]]:
    """Collects what goes wrong in `restore`, which then returns what it was given as a target."""
    errors: list[Exception] = []
    token = _DEFERRED.set(errors)
    try:
        yield errors
    finally:
        _DEFERRED.reset(token)


@contextlib.contextmanager
def examined(
    directory: Any, args: Any, aggregate: str | None = None, *, verifies: bool
) -> Iterator[Contents | None]:
    """Refuses a malformed checkpoint; as a corrupt one, where its digests say that it is that.

    Gives what the checkpoint holds. Within it Python collects no garbage.

    Args:
        directory: the item's directory.
        args: what is to be restored; `None` for metadata alone.
        aggregate: the file in which older checkpoints keep small arrays, if it has another name.
        verifies: whether to ask the digests.

    Raises:
        MalformedCheckpointError: it is not a checkpoint that Orbax wrote.
        CorruptCheckpointError: it was one.
    """
    try:
        beside = digest_file.DIRECTORY if verifies else ""
        with without_garbage_collection(), checked(directory, args, aggregate, beside) as contents:
            yield contents
    except MalformedCheckpointError as error:
        if verifies:
            stored = StoredItem(str(directory))
            # Its data may be what is dangerous.
            problems = [*stored.problems, *stored.check_files()]
            if stored.is_covered and error.file != str(directory):  # Else it is only too large.
                problems = problems or [error.problem]
            raise_corrupt(str(directory), problems, error, look=True)
        raise


def restore(question: Question, contents: Contents | None) -> Any:
    """Restores an item, and verifies it if it is told to.

    Args:
        question: what to restore.
        contents: what is known to be there.

    Raises:
        RestoreError: the target does not fit what is stored.
        CorruptCheckpointError: what is stored, or was restored, is not what was saved.
    """
    is_alone = _DEFERRED.get() is None
    asks = question.verifies and question.is_shared
    return agreed(
        question.directory,
        lambda: _restored(question, contents, look=is_alone),
        instead=getattr(question.args, "item", None),
        asks=asks,
        recorder=question.recorder,
    )


def agreed(
    directory: Any,
    action: Callable[[], Any],
    *,
    instead: Any,
    asks: bool,
    recorder: RestoreRecorder,
) -> Any:
    """Restores, and fails where another process fails: who did not would wait in Orbax's barrier.

    Args:
        directory: the item's directory.
        action: restores it.
        instead: what to return where it fails while errors are deferred.
        asks: whether to ask the other processes.
        recorder: is told of the error.

    Raises:
        RestoreError: another process failed.
    """
    errors, failure, value = _DEFERRED.get(), None, None
    try:
        value = action()
    except Exception as error:  # noqa: BLE001 - Raised below, or put where it is waited for.
        failure = error
        recorder.note(error=error)
    if errors is not None:
        errors += [failure] if failure is not None else []
        return instead if failure is not None else value
    failed = consensus.which_processes(failure is not None) if asks else []
    if failure is not None:
        raise failure
    if failed:
        raise RestoreError(f"{directory} was not restored: process {failed[0]} failed; see there.")
    return value


def _restored(question: Question, contents: Contents | None, *, look: bool) -> Any:
    # With several processes one looks for another step: each would read all of it.
    look = look and jax.process_index() == 0
    place = str(question.directory)
    files = contents.files if contents is not None else None
    stored, beside = StoredItem(place, files) if question.verifies else None, None
    if stored is not None and stored.is_covered:
        raise_corrupt(place, [*stored.problems, *stored.check_files()], look=look)
        if jax.process_index() == 0:  # Meanwhile, for a bucket takes its time.
            look_beside = functools.partial(step_metadata.check_beside, stored.files)
            beside = threads.run(look_beside, "lazy_orbax-step")
    else:
        stored = None
    try:
        with explained(question.metadata, question.directory, question.args):
            found = restore_either_way(question, contents, stored)
    except CorruptCheckpointError:
        raise
    except Exception as error:
        if stored is not None and error is not question.recorder.ended_by:
            raise_corrupt(place, _reasons(stored, error), error, look=look)
        raise
    question.recorder.mark("on_device")
    if question.recorder.is_by_plan:
        done = question.recorder.timeline
        metrics.record_read(place, done.bytes_wanted, done.on_device_s or 0.0)
    if stored is not None:
        problems = [explain(stored, piece) for piece in found.wrong]
        problems = problems or check_restored(stored, found.unchecked())
        raise_corrupt(place, problems, look=look)
        question.recorder.mark("verified")
    for problem in beside.result() if beside is not None else ():
        _LOG.warning("Of the step of %s, %s. The item itself is whole.", place, problem)
    return found.value


def _reasons(stored: StoredItem, error: Exception) -> list[Problem]:
    """Returns what is wrong with a checkpoint that could not be restored. Nothing, if it is whole.

    Where the target is what does not fit, no data is read.
    """
    problems = stored.check_arrays()
    if not problems and not isinstance(error, RestoreError):
        problems = list(stored.check_pieces(stored.pieces))
    return problems
