"""Makes what was written to a local directory durable, while more is being written."""

from __future__ import annotations

import concurrent.futures
import errno
import os
from collections.abc import Collection, Iterable, Iterator

_THREADS = 8
# A directory of more files than this is not looked through again and again while it is written.
_MOST_WATCHED = 1000

_LARGE_BYTES = 2**20
PROCESS_DIRECTORY = "ocdbt.process_"
_DROPS = hasattr(os, "posix_fadvise")

_Version = tuple[int, int, int]
# Device and number.
Inode = tuple[int, int]


class Syncer:
    """Syncs the files under a local directory, each once, as they appear.

    Waiting with all of it until the end would leave the disk idle while the last bytes are copied
    to the kernel. Used by one thread at a time, after which `close` must be called.

    Attributes:
        directories: those below it in which `finish` synced everything.
    """

    def __init__(self, directory: str, own: Collection[str]):
        """Starts no thread yet.

        Args:
            directory: an existing local directory.
            own: which of its `ocdbt.process_...` directories this process writes. Other processes
                sync theirs.
        """
        self._directory, self._own = directory, own
        self._pool = concurrent.futures.ThreadPoolExecutor(
            _THREADS, thread_name_prefix="lazy_orbax-sync"
        )
        self._begun: dict[str, _Version] = {}
        self._syncing: list[concurrent.futures.Future[None]] = []
        self._walk: concurrent.futures.Future[None] | None = None
        self.directories: set[Inode] = set()

    def begin(self) -> None:
        """Starts to sync the files that are there and were not synced yet. Does not wait."""
        walking = self._walk is not None and not self._walk.done()
        if not walking and len(self._begun) <= _MOST_WATCHED:
            self._walk = self._pool.submit(self._sync_new)

    def finish(self) -> None:
        """Waits until everything under the directory is durable, the directories too.

        Raises:
            OSError: the storage refused.
        """
        self._collect()
        self._sync_new()
        self._collect()
        directories = [path for path, _ in self._walk_own()]
        sync_all(directories)
        self.directories = {inode_of(path) for path in directories[1:]}

    def close(self) -> None:
        """Joins the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self) -> None:
        """Waits for what began, and raises what went wrong."""
        if self._walk is not None:
            self._walk.result()
        for future in self._syncing:
            future.result()
        self._syncing.clear()

    def _sync_new(self) -> None:
        for path, version in self._files():
            # A file that was replaced or that grew since then is not the one that was synced.
            if self._begun.get(path) != version:
                self._begun[path] = version
                self._syncing.append(self._pool.submit(_sync, path))

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
                if name in self._own or not name.startswith(PROCESS_DIRECTORY)
            ]
            yield path, names


def sync_all(paths: Iterable[str]) -> None:
    """Makes files and directories durable, all at once: file systems then do it in few steps.

    Raises:
        OSError: the storage refused.
    """
    with concurrent.futures.ThreadPoolExecutor(
        _THREADS, thread_name_prefix="lazy_orbax-sync"
    ) as pool:
        for synced in [pool.submit(_sync, path) for path in paths]:
            synced.result()


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
            raise
    finally:
        os.close(descriptor)
