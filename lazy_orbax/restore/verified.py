"""A restore, by plan or by Orbax: verified, agreed on, and its complaints name the leaf."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from lazy_orbax._jax_context import neutral
from lazy_orbax._machine import without_garbage_collection
from lazy_orbax._orbax import metrics, restored_kinds, symbols
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    Problem,
    RestoreError,
    summarize,
)
from lazy_orbax.integrity import digest_file, step_metadata
from lazy_orbax.integrity.stored_item import StoredItem
from lazy_orbax.integrity.verify import raise_corrupt
from lazy_orbax.pods import consensus
from lazy_orbax.restore.compare_arrays import check_restored, explain
from lazy_orbax.restore.either_way import Question, restore_either_way
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


@contextlib.contextmanager
def explained(metadata: Callable[[Any], Any], directory: Any, args: Any) -> Iterator[None]:
    """Turns a misfit between target and checkpoint into a `RestoreError`.

    Args:
        metadata: returns what Orbax says of what is in a directory.
        directory: the item's directory.
        args: what was asked for, or `None`.

    Raises:
        RestoreError: leaves of the target have another shape than what is stored, or the trees
            differ.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        differs = any(words in str(error) for words in symbols.MISFITS)
        misfits = _misfits(metadata, directory, args, differs=differs)
        if misfits:
            orbax = f"\nOrbax says: {error}" if differs else ""
            raise RestoreError(
                f"The restore target does not fit the checkpoint {directory}:"
                f"{summarize(misfits)}{orbax}"
            ) from error
        if differs:
            raise RestoreError(f"{error}\nThe checkpoint is {directory}.") from error
        raise


def _misfits(
    metadata: Callable[[Any], Any], directory: Any, args: Any, *, differs: bool
) -> list[str]:
    """Names leaves of another shape than what is stored; where trees differ, what one alone has."""
    target = getattr(args, "item", None)
    if target is None:
        return []
    try:
        tree = metadata(directory).tree
    except Exception:  # noqa: BLE001 - A broken checkpoint: what restoring said of it is raised.
        return []
    stored = {_names(path): (path, leaf) for path, leaf in tree_leaves_with_path(tree)}
    given = tree_leaves_with_path(getattr(args, "restore_args", None))
    arguments = {_names(path): argument for path, argument in given}
    problems = []
    for path, leaf in tree_leaves_with_path(target):
        name = keystr(path)
        if differs and _names(path) not in stored:
            problems.append(f"{name}: {_what_is_there(stored, _names(path))}")
        _, entry = stored.pop(_names(path), (None, None))
        found = getattr(entry, "shape", None)
        wanted = _insisted_shape(arguments.get(_names(path)), leaf)
        if found is None or wanted is None or tuple(found) == tuple(wanted):
            continue
        problems.append(
            f"{name}: found {list(found)}, wanted {list(wanted)}; give the stored shape, or "
            "strict=False to cut or pad"
        )
    if differs and not getattr(args, "partial_restore", False):
        problems += [
            f"{keystr(path)}: the target lacks this leaf of the checkpoint; add it, or restore a "
            "part with lazy_orbax.load(path, target)"
            for path, _ in stored.values()
        ]
    return problems


def _what_is_there(stored: dict[tuple[str, ...], Any], leaf: tuple[str, ...]) -> str:
    """Says what the checkpoint has in place of a leaf of the target, which then counts as named."""
    below = [path for path in stored if path[: len(leaf)] == leaf]
    for path in below:
        del stored[path]
    if not below:
        return "the checkpoint has no such leaf; take it out of the target"
    named = ", ".join(".".join(path) for path in below[:3]) + (", ..." if below[3:] else "")
    return f"found a tree, wanted a leaf; give the target each leaf of it: {named}"


def _insisted_shape(argument: Any, leaf: Any) -> Any:
    """Returns the shape in which a leaf has to be stored; `None` where Orbax takes any."""
    if not isinstance(argument, ocp.ArrayRestoreArgs) or not argument.strict:
        return None
    shape, dtype = restored_kinds.completed(argument, leaf).global_shape, argument.dtype
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return shape
    with neutral():  # The data of keys is what is stored.
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype)).shape


def _names(path: Any) -> tuple[str, ...]:
    """Returns a key path as the names that Orbax stores, whatever the containers are."""
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
