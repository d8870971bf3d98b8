"""What Orbax leaves unsynced of a local step: the merge, its small files, and every rename.

Orbax finalizes each item (`before_publication`), renames the step's directory, and reports it
(`_after_publication`), all in one thread. `DurablePath` also syncs between the last two.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Iterator, Set

from lazy_orbax import _paths
from lazy_orbax.errors import NotDurableError
from lazy_orbax.save.publication import Publication
from lazy_orbax.storage.fsync import Inode, inode_of, sync_all
from lazy_orbax.storage.places import place_of
from lazy_orbax.storage.save_error import save_error

# Where no handler of ours tells `LazyOptions.storage_timeout_s`.
TIMEOUT_S = 300.0


@dataclasses.dataclass
class _Step:
    """A step that this thread publishes.

    Attributes:
        directory: where it is before that.
        synced: directories in which everything was synced by those who wrote it.
        files: inode, bytes and time of change of files that were synced here.
        timeout_s: most seconds in which nothing may become durable.
    """

    directory: str
    timeout_s: float = TIMEOUT_S
    synced: set[Inode] = dataclasses.field(default_factory=set)
    files: set[tuple[int, int, int]] = dataclasses.field(default_factory=set)


_publishing = threading.local()


def before_publication(
    publication: Publication, item_directory: str, synced: Set[Inode], *, timeout_s: float
) -> None:
    """Syncs what is in the step of an item, which was merged, before Orbax publishes it.

    Args:
        publication: what awaits that. It learns what is to be synced afterwards.
        item_directory: the item's directory. Nothing is done for an object store.
        synced: directories below it in which everything is synced already.
        timeout_s: most seconds in which nothing may become durable, here and afterwards.

    Raises:
        SaveError: the storage refused, or did nothing for too long.
    """
    if not place_of(item_directory).needs_sync:
        return
    directory = published_with(item_directory)
    step = step_at(directory)
    step.synced |= synced
    step.timeout_s = timeout_s
    # Until Orbax has published it in this thread, `DurablePath` adds to what this knows.
    _publishing.step = step
    publication.sync = functools.partial(_after_publication, step)
    publication.is_there = functools.partial(_is_published, directory)
    try:
        sync_all(lambda: not_synced(step, directory), directory, timeout_s=timeout_s)
    except OSError as error:
        raise save_error(item_directory, error) from error


def _after_publication(step: _Step) -> None:
    """Syncs what came with the publication of a step.

    Raises:
        NotDurableError: the storage refused, or did nothing for too long. The step is listed.
    """
    if getattr(_publishing, "step", None) is step:
        # The step is public: what this thread does next belongs to another one.
        _publishing.step = None
    directory = _paths.published(step.directory)

    def changed() -> Iterator[str]:
        yield from not_synced(step, directory)
        yield from directories_above(directory)

    try:
        sync_all(changed, directory, timeout_s=step.timeout_s)
    except OSError as error:
        raise not_durable(directory, error) from error


def published_with(item_directory: str) -> str:
    """Returns the directory that Orbax publishes with an item: its own, or that of its step."""
    own, above = _paths.places_of_step(item_directory)
    has_own, has_above = (
        os.path.exists(os.path.join(place, _paths.STEP_METADATA)) for place in (own, above)
    )
    is_item = not has_own and (has_above or _paths.is_temporary(above))
    return above if is_item else own


def _is_published(directory: str) -> bool:
    """Whether what was at `directory` is where everybody sees it."""
    final = _paths.published(directory)
    if directory == final:  # Orbax renames nothing.
        return os.path.exists(os.path.join(final, _paths.COMMITTED))
    return os.path.lexists(final) and not os.path.lexists(directory)


def step_at(directory: str) -> _Step:
    """Returns what this thread knows of a step. A step that was never published is forgotten."""
    step = getattr(_publishing, "step", None)
    return step if step is not None and step.directory == directory else _Step(directory)


def not_synced(step: _Step, directory: str) -> Iterator[str]:
    """Yields the files and directories that may have changed since they were synced.

    Who writes into a directory of its own process, or of a leaf, syncs it.
    """
    for path, directories, names in os.walk(directory):
        directories[:] = [
            name
            for name in directories
            if not name.startswith(_paths.PROCESS_DIRECTORY)
            and inode_of(os.path.join(path, name)) not in step.synced
        ]
        for name in names:
            file = os.path.join(path, name)
            try:
                found = os.stat(file, follow_symlinks=False)
            except FileNotFoundError:
                continue  # What a network file system or a helper keeps for a moment.
            version = (found.st_ino, found.st_size, found.st_mtime_ns)
            # Orbax rewrites its own in place, perhaps within a tick of the file system's clock.
            if path == directory or version not in step.files:
                step.files.add(version)
                yield file
        yield path


def directories_above(directory: str) -> Iterator[str]:
    """Yields the directories above a step, which Orbax may have created, and what it wrote there.

    All the way up: syncing what did not change costs little, and says that it did not.
    """
    path = os.path.dirname(os.path.realpath(directory))
    root_metadata = os.path.join(path, _paths.ROOT_METADATA)
    if os.path.exists(root_metadata):
        yield root_metadata
        yield os.path.dirname(root_metadata)
    yield path
    while not os.path.ismount(path):
        path = os.path.dirname(path)
        if os.access(path, os.R_OK):  # Who cannot read it has not created it.
            yield path


def not_durable(directory: str, error: OSError) -> NotDurableError:
    """Returns the error for a step that is listed and could not be synced."""
    directory = _paths.published(directory)
    step = _paths.step_of(os.path.basename(directory))
    return NotDurableError(str(error), step=step, directory=directory, file=error.filename)
