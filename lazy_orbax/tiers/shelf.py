"""The directory in which snapshots stand: of one user alone, in memory, with a limit in bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.snapshot_file import Snapshot, SnapshotError, read_snapshot

MEMORY = "/dev/shm"
GENERATIONS = 2
"""The newest whole snapshot stays as it is while the next one is written."""
_SNAPSHOT, _PARITY = ".slabs", ".parity"
_FILE = re.compile(r"[0-9a-f]{32}\.[0-9]+\.(slabs|parity)")
_CLAIM = re.compile(r"[0-9a-f]{32}\.claim")
_LOCK, _SOCKET, _LOG = "lock", "socket", "keeper.log"
# What Linux allows for the path of a socket.
_LONGEST_SOCKET = 107


class Full(KeeperError):
    """There is no room for a snapshot."""


def place_for(path: str | None) -> str:
    """Returns where a keeper's directory is, if it is there; `None` is this user's usual one."""
    return os.path.abspath(path or f"{MEMORY}/lazy_orbax-{os.geteuid()}")


class Shelf:
    """A directory that only this user may enter.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str | None = None):
        """Makes the directory, or checks the one that is there.

        Args:
            path: an absolute path, in a file system in memory; `None` is one of this user's in
                `/dev/shm`.

        Raises:
            KeeperError: it is not this user's alone, or cannot be made.
        """
        self.path = place_for(path)
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET:
            raise KeeperError(
                f"the keeper's directory {self.path} has {len(os.fsencode(self.path))} bytes in "
                f"its name, and at most {_LONGEST_SOCKET - len(_SOCKET) - 1} fit a socket in it; "
                "give a shorter one"
            )
        self._make()

    def _make(self) -> None:
        user = os.geteuid()
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            status = os.lstat(self.path)
        except OSError as error:
            raise KeeperError(
                f"the keeper's directory {self.path} cannot be made: {error}"
            ) from error
        if not stat.S_ISDIR(status.st_mode):
            raise KeeperError(f"{self.path} is no directory; give the keeper another")
        if status.st_uid != user or stat.S_IMODE(status.st_mode) & 0o077:
            raise KeeperError(
                f"the keeper's directory {self.path} is of user {status.st_uid}, with the mode "
                f"{stat.S_IMODE(status.st_mode):o}; wanted user {user} and 700. Give another, or "
                "have it removed"
            )

    @property
    def socket(self) -> str:
        """Where the keeper listens."""
        return f"{self.path}/{_SOCKET}"

    @property
    def log(self) -> str:
        """What the keeper says."""
        return f"{self.path}/{_LOG}"

    def lock(self) -> int | None:
        """Returns a descriptor that makes this process the keeper; `None`: another is."""
        self._make()  # A keeper that ended since has removed it.
        path, flags = f"{self.path}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return None
        os.close(descriptor)  # Of a keeper that removed it at its end: it locks nobody out.
        return None

    @property
    def is_served(self) -> bool:
        """Whether a keeper is alive here."""
        descriptor = self.lock()
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def files(self) -> list[str]:
        """Returns the names of the files of snapshots and of parity, whole or not."""
        try:
            return sorted(name for name in os.listdir(self.path) if _FILE.fullmatch(name))
        except FileNotFoundError:
            return []

    def path_of(self, file: str) -> str:
        """Returns the path of a file of a snapshot.

        Raises:
            KeeperError: it is no such name.
        """
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise KeeperError(f"{file!r} is not the name of a snapshot")
        return f"{self.path}/{file}"

    def snapshots(self) -> Iterator[tuple[str, Snapshot | SnapshotError]]:
        """Yields each file with the snapshot in it, or why it holds none."""
        return self._read(_SNAPSHOT)

    def parities(self) -> Iterator[tuple[str, Snapshot | SnapshotError]]:
        """Yields each file with the parity of other snapshots in it, or why it holds none."""
        return self._read(_PARITY)

    def _read(self, kind: str) -> Iterator[tuple[str, Snapshot | SnapshotError]]:
        for file in self.files():
            if not file.endswith(kind):
                continue
            try:
                yield file, read_snapshot(self.path_of(file))
            except SnapshotError as error:
                yield file, error
            except OSError as error:
                yield file, SnapshotError(str(error))

    def used_bytes(self, *, without: str = "") -> int:
        """Returns the bytes of all files of snapshots but one."""
        total = 0
        for file in self.files():
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(self.path_of(file)).st_size if file != without else 0
        return total

    def make_room(self, file: str, n_bytes: int, limit_bytes: int) -> None:
        """Makes a file of so many bytes, with memory behind each, or lengthens the one there is.

        Raises:
            Full: it does not fit the limit, or the file system.
        """
        used = self.used_bytes(without=file)
        if used + n_bytes > limit_bytes:
            raise Full(
                f"a snapshot of {n_bytes} bytes does not fit beside the {used} bytes that are "
                f"kept: the keeper's limit is {limit_bytes}. Give it a higher `limit_bytes`: two "
                "generations of each process and item must fit"
            )
        path = self.path_of(file)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        before = os.fstat(descriptor).st_size
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            # What it got before it failed is given back.
            os.ftruncate(descriptor, before)
            if before == 0:
                os.unlink(path)
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM, errno.EDQUOT):
                raise
            raise Full(_no_space(self.path, n_bytes)) from error
        finally:
            os.close(descriptor)

    def remove(self, file: str) -> None:
        """Removes the file of a snapshot. Whoever has it mapped keeps the memory until it ends."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path_of(file))

    def is_claimed(self, run: str, process: int) -> bool:
        """Whether another process than this one writes what that process of a run saves."""
        name = claim_of(run, process)
        return os.path.exists(f"{self.path}/{name}") and not self._is_free(name)

    def _is_free(self, claim: str) -> bool:
        with contextlib.suppress(OSError), open(f"{self.path}/{claim}", "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def _claims(self) -> list[str]:
        """Returns the claims that nobody has any more."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else ()
        return [name for name in names if _CLAIM.fullmatch(name) and self._is_free(name)]

    def tidy(self) -> None:
        """Removes what a keeper left that is gone, if there is no snapshot."""
        if (lock := self.lock()) is not None:
            if not self.files():
                self.remove_all()
            os.close(lock)

    def remove_all(self) -> None:
        """Removes everything, the directory too if nothing of anybody else's is in it."""
        for name in (*self.files(), *self._claims(), _SOCKET, _LOG, _LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.path}/{name}")
        with contextlib.suppress(OSError):
            os.rmdir(self.path)


def claim_of(run: str, process: int) -> str:
    """Returns the name of the file that one who writes what a process saves has locked."""
    return f"{_key_of(run, process)}.claim"


def file_of(run: str, item: str, process: int, generation: int) -> str:
    """Returns the name of the file for a generation of what a process saves of an item."""
    return f"{_key_of(run, item, process)}.{generation}{_SNAPSHOT}"


def parity_file_of(run: str, item: str, process: int, generation: int) -> str:
    """Returns the name of the file for a generation of the parity that a process has of others."""
    return f"{_key_of(run, item, process)}.{generation}{_PARITY}"


def _key_of(*whose: str | int) -> str:
    text = json.dumps(whose).encode()
    return f"{digest_of_bytes(text):016x}{digest_of_bytes(text, seed=1):016x}"


def _no_space(path: str, n_bytes: int) -> str:
    status = os.statvfs(path)
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    return (
        f"{path} has {free} of {total} bytes free, and a snapshot takes {n_bytes}; two generations "
        "of each process and item must fit. A container gets 64 MiB of /dev/shm by default: give "
        "`docker run --shm-size=...`, or in Kubernetes an emptyDir with `medium: Memory` at "
        "/dev/shm; or give the keeper another directory in memory"
    )
