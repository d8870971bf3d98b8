"""The end of an attempt that Orbax gave up, or passed over.

Orbax tells a handler little: not that it could not create a directory, nor, on a process that does
not publish, that a step was published. So what became of an item is found out here, by who waits
for it, when Orbax gives the step up, or when the next save begins; and only here is it decided
whether what a failed step wrote may be removed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from lazy_orbax import _paths
from lazy_orbax._orbax import functions, lifecycle, waiting
from lazy_orbax.errors import SaveError
from lazy_orbax.recovery.attempt import Attempt, Fate, Part, attempts_below
from lazy_orbax.storage import deadline


def refuse(attempt: Attempt, failure: SaveError) -> None:
    """Ends an attempt because `save()` raises `failure`."""
    attempt.refuse(failure)
    for part in attempt.parts:
        part.writing.stop(failure)
    if all(part.directory for part in attempt.parts):
        # Every directory is known, so nothing can come to be after this.
        for part in attempt.parts:
            clean_up(part, failure)
    # Else Orbax may be creating the directories; they go when the next save begins.


def end_earlier(parts: Iterable[Part], place: str) -> None:
    """Ends what Orbax has passed over, now that the next save begins.

    It starts no save below a directory before it has done with the one before.

    Args:
        parts: of earlier saves.
        place: where the next save goes.
    """
    for part in parts:
        here, operation = part.recorder.timeline.directory, part.attempt.operation
        same_run = _paths.places_of_run(here) & _paths.places_of_run(place)
        if not same_run or operation == lifecycle.operation_id():
            continue
        if functions.is_going_on(operation):  # Several of these may run beside each other.
            continue
        forgo(part)
        if is_given_up(part, threading.current_thread()):
            remove_leftovers(part)
        if part.fate not in (Fate.PROMISED, Fate.WRITING):
            part.recorder.end()


def end_below(directory: str) -> None:
    """Removes what failed saves left below a directory, once Orbax has ended with them.

    Args:
        directory: of a checkpoint manager that has no save in progress.
    """
    this_thread = threading.current_thread()
    for part in [part for attempt in attempts_below(directory) for part in attempt.parts]:
        # Orbax's thread that waited for it may be publishing until it has ended.
        if part.waiter is not None and part.waiter is not this_thread:
            part.waiter.join()
        if is_given_up(part, this_thread):
            forgo(part)
            remove_leftovers(part)


def is_given_up(part: Part, this_thread: threading.Thread | None) -> bool:
    """Whether nobody is left who could publish the step, if it is not published yet.

    Args:
        part: of the step.
        this_thread: which Orbax has left where it is the one that waited for the item.
    """
    if functions.is_going_on(part.attempt.operation):
        return False
    waited = {other.waiter for other in part.attempt.parts} - {None, this_thread}
    if waited or this_thread is None:
        return bool(waited) and not any(thread.is_alive() for thread in waited if thread)
    return not lifecycle.may_be_publishing()


def forgo(part: Part) -> None:
    """Ends a save that waits for a directory which Orbax has not created and will not create."""
    operation = part.attempt.operation
    if part.directory or not waiting.promised_directories(operation):
        return
    # A thread of Orbax that is released may create the directory yet.
    may_come = waiting.release_waiting(operation)
    part.writing.forgo(SaveError("Orbax could not create the directory"), may_run=may_come)
    if may_come:
        part.move(Fate.FORGONE)


def remove_leftovers(part: Part) -> None:
    """Removes what is there of a step that is not published and will not be."""
    if part.recorder.timeline.committed_s is not None:
        part.move(Fate.PUBLISHED)  # The directory has its final name: nothing is left to remove.
    elif part.fate is not Fate.CLEAN and part.attempt.is_there:
        failure = part.failure or SaveError("Orbax did not publish the step")
        part.recorder.end(error=failure)
        clean_up(part, failure if isinstance(failure, SaveError) else None)
    elif part.fate is Fate.FORGONE:  # It is looked for once more.
        part.move(Fate.FAILED)
    elif part.fate is Fate.FAILED or part.failure is not None:
        part.move(Fate.FAILED)
        part.move(Fate.CLEAN)
    else:  # Another process published it.
        part.move(Fate.PUBLISHED)


def clean_up(part: Part, failure: SaveError | None) -> None:
    """Removes what was written of a step that has failed. Orbax must not be at a later one.

    What cannot be removed yet is tried again when the next save begins.

    Args:
        part: an item of the step, which was waited for as long as was allowed.
        failure: what the other items end with.
    """
    attempt = part.attempt
    for other in attempt.parts:
        if other is not part:
            other.writing.stop(failure)
    items = [other.directory for other in attempt.parts if other.directory]
    # A thread that hangs in the storage, or a write that was given up, may still come to them.
    writing = any(other.fate is Fate.WRITING for other in attempt.parts)
    if writing or not all(map(deadline.is_quiet, items)):
        return
    everything = attempt.removes_all and part.writing.is_alone()
    # Its directory is nobody's from here on, whatever it was before.
    part.move(Fate.FAILED)
    gone = attempt.remove(items, None if everything else part.writing.own_directories())
    # The others' part of it is what they or the next save remove.
    if gone and (everything or not attempt.removes_all):
        part.move(Fate.CLEAN)
