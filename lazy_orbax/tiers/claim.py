"""Of each run, one process at a time writes the snapshots of a process: it has the claim."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.shelf import Shelf, claim_of

# One that was killed lets go when the kernel has freed all its memory.
_PATIENCE_S = 10.0
_LOOK_S = 0.05
_MINE: weakref.WeakValueDictionary[str, Claim] = weakref.WeakValueDictionary()


class Claim:
    """The right to write the snapshots of one process of a run. It ends with this process.

    The kernel has it, so that it outlives the keeper. Children that this process forks do not have
    it, and do not keep it from ending.
    """

    def __init__(self, shelf: Shelf, run: str, process: int):
        """Takes it.

        Args:
            shelf: where the snapshots are.
            run: the run.
            process: the process.

        Raises:
            KeeperError: somebody has it.
        """
        self._path, self._pid = f"{shelf.path}/{claim_of(run, process)}", os.getpid()
        deadline_s = time.monotonic() + _PATIENCE_S
        if self._path in _MINE:
            raise KeeperError(f"this process has a Keeper of {run}; close it before the next one")
        while (descriptor := self._taken()) is None:
            if time.monotonic() > deadline_s:
                raise KeeperError(
                    f"another process trains process {process} of {run}, {self._holder()}, and "
                    "writes the same snapshots; end it, or give another run or directory"
                )
            time.sleep(_LOOK_S)
        self._release = weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(self._pid).encode())
        _MINE[self._path] = self

    def _taken(self) -> int | None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o600)
        try:
            # Not `flock`: that would be held by every child, too.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(self._path).st_ino:
                return descriptor
        except (BlockingIOError, PermissionError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def _holder(self) -> str:
        try:
            with open(self._path) as file:
                return f"pid {file.read(20)}"
        except OSError:
            return "which is ending"

    @property
    def is_a_childs(self) -> bool:
        """Whether this is the memory of a forked child, which has no claim."""
        return os.getpid() != self._pid

    def release(self) -> None:
        """Lets go of it, and of the directory where nothing else is in it."""
        if self._release.alive and not self.is_a_childs:
            _MINE.pop(self._path, None)
            with contextlib.suppress(OSError):
                os.unlink(self._path)
                os.rmdir(os.path.dirname(self._path))
            self._release()
