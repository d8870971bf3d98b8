"""Makes what was written to a local directory durable, while more is being written."""

from __future__ import annotations

import concurrent.futures
import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from typing import Any

from lazy_orbax import _paths
from lazy_orbax.storage.threads import Crew, await_progress

_THREADS = 8
# A directory of more files than this is not looked through again and again while it is written.
_MOST_WATCHED = 1000

_LARGE_BYTES = 2**20
# Of a thread: small files and directories take hardly any time each.
_SMALL = 1 / 8
_DROPS = hasattr(os, "posix_fadvise")

_Version = tuple[int, int, int]
# Device and number.
Inode = tuple[int, int]


class Syncer:
    """Syncs the files under a local directory, each once, as they appear.

    Waiting with all of it until the end would leave the disk idle while the last bytes are copied
    to the kernel. Used by one thread at a time, after which `close` must be called. Whatever may
    hang on a storage that does not answer is in threads of ours, for which nobody has to wait.

    Attributes:
        directories: those below it in which `finish` synced everything.
    """

    def __init__(self, directory: str, own: Collection[str], *, timeout_s: float):
        """Starts no thread yet.

        Args:
            directory: an existing local directory.
            own: which of its `ocdbt.process_...` directories this process writes. Other processes
                sync theirs.
            timeout_s: most seconds in which nothing may become durable.
        """
        self._directory, self._own, self._timeout_s = directory, own, timeout_s
        self._crew, self._is_stuck = Crew("lazy_orbax-sync", _THREADS), False
        self._begun: dict[str, _Version] = {}
        self._syncing: dict[concurrent.futures.Future[Any], str] = {}
        self._walk: concurrent.futures.Future[Any] | None = None
        self.directories: set[Inode] = set()

    def begin(self) -> None:
        """Starts to sync the files that are there and were not synced yet. Does not wait."""
        walking = self._walk is not None and not self._walk.done()
        if not walking and len(self._begun) <= _MOST_WATCHED:
            self._walk = self._crew.submit(self._sync_new, weight=_SMALL)

    def finish(self) -> None:
        """Waits until everything under the directory is durable, the directories too.

        Raises:
            OSError: the storage refused, or did nothing for too long.
        """
        self._collect()
        self._await({self._crew.submit(self._sync_new, weight=_SMALL): self._directory})
        self._collect()
        listing = self._crew.submit(self._list, weight=_SMALL)
        self._await({listing: self._directory})
        directories = listing.result()
        self.sync(directories)
        self.directories = set(list(directories.values())[1:])

    def sync_found(self, find: Callable[[], Iterable[str]]) -> None:
        """Looks for files and directories, and makes them durable.

        Raises:
            OSError: the storage refused, or did nothing for too long.
        """
        finding = self._crew.submit(lambda: list(find()), weight=_SMALL)
        self._await({finding: self._directory})
        self.sync(finding.result())

    def sync(self, paths: Iterable[str]) -> None:
        """Makes these files and directories durable, all at once.

        Raises:
            OSError: the storage refused, or did nothing for too long.
        """
        self._await({self._crew.submit(_sync, path, weight=_SMALL): path for path in paths})

    def _list(self) -> dict[str, Inode]:
        return {path: inode_of(path) for path, _ in self._walk_own()}

    def close(self) -> None:
        """Joins the threads, unless the storage holds them. They end by themselves then."""
        self._crew.close(0 if self._is_stuck else self._timeout_s)

    def _collect(self) -> None:
        """Waits for what began, and raises what went wrong."""
        if self._walk is not None:
            self._await({self._walk: self._directory})
        syncing, self._syncing = self._syncing, {}
        self._await(syncing)

    def _await(self, paths: dict[concurrent.futures.Future[Any], str]) -> None:
        """Waits for what is done to some paths, as long as there is progress."""
        ended = 0

        def goes_on() -> bool:
            nonlocal ended
            before, ended = ended, sum(future.done() for future in paths)
            return ended > before

        try:
            await_progress(
                paths, timeout_s=self._timeout_s, what="nothing was synced", goes_on=goes_on
            )
        except TimeoutError as error:
            at_work = [path for f, path in {**self._syncing, **paths}.items() if f.running()]
            self._is_stuck = True
            error.filename = max(at_work, default=self._directory, key=len)
            raise
        for future in paths:
            future.result()

    def _sync_new(self) -> None:
        for path, version in self._files():
            # A file that was replaced or that grew since then is not the one that was synced.
            if self._begun.get(path) != version:
                self._begun[path] = version
                weight = 1.0 if version[1] >= _LARGE_BYTES else _SMALL
                self._syncing[self._crew.submit(_sync, path, weight=weight)] = path

    def _files(self) -> Iterator[tuple[str, _Version]]:
        for path, names in self._walk_own():
            for name in names:
                file = os.path.join(path, name)
                try:
                    found = os.stat(file, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # A temporary file, renamed since the directory was listed.
                yield file, (found.st_ino, found.st_size, found.st_mtime_ns)

    def _walk_own(self) -> Iterator[tuple[str, list[str]]]:
        for path, directories, names in os.walk(self._directory):
            directories[:] = [
                name
                for name in directories
                if name in self._own or not name.startswith(_paths.PROCESS_DIRECTORY)
            ]
            yield path, names


class NothingToSync:
    """Stands for a `Syncer` where a write that was acknowledged is durable."""

    directories: Set[Inode] = frozenset()

    def begin(self) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def sync_all(find: Callable[[], Iterable[str]], directory: str, *, timeout_s: float) -> None:
    """Makes files and directories durable, all at once: file systems then do it in few steps.

    Args:
        find: yields them. It is called in a thread of ours, for looking may hang as well.
        directory: where it looks.
        timeout_s: most seconds in which nothing may become durable.

    Raises:
        OSError: the storage refused, or did nothing for too long.
    """
    syncer = Syncer(directory, (), timeout_s=timeout_s)
    try:
        syncer.sync_found(find)
    finally:
        syncer.close()


def inode_of(path: str) -> Inode:
    """Returns what a file or directory keeps when it is renamed."""
    found = os.stat(path)
    return (found.st_dev, found.st_ino)


def _sync(path: str) -> None:
    """Makes a file or directory durable, and gives back the page cache that a large file took.

    Nobody reads a checkpoint that was just written, and the pages are better used by the next one,
    or by the training data.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return  # As above.
    try:
        os.fsync(descriptor)
        if _DROPS and os.fstat(descriptor).st_size >= _LARGE_BYTES:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems cannot sync a directory.
            error.filename = path  # Of a descriptor, the error names no file.
            raise
    finally:
        os.close(descriptor)
