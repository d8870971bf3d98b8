"""An export is in a hidden directory until it is whole. A lock tells whether somebody is at it.

The kernel has the lock, so that it ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from lazy_orbax.recovery import leftovers
from lazy_orbax.storage.fsync import sync_all

_TIMEOUT_S = 300.0
_NAME = re.compile(r"\.(.+)\.exporting-[0-9a-f]{8}")


def exports_in(directory: Any, target: str | None = None) -> list[Any]:
    """Returns the hidden directories of exports, whether somebody is at them or not.

    Args:
        directory: where they are, as a path object with `iterdir`.
        target: the name that they were to have; `None` is any.
    """
    found = ((_NAME.fullmatch(child.name), child) for child in directory.iterdir())
    wanted = (child for name, child in found if name and target in (None, name[1]))
    return sorted(wanted, key=lambda child: child.name)


@contextlib.contextmanager
def held(directory: str) -> Iterator[bool]:
    """Holds the lock of a directory for a while. Gives whether it does, or somebody else."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(directory, flags)
    except OSError:  # It is a link, or gone.
        yield False
        return
    try:
        yield _is_locked(descriptor, directory)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, directory: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(directory))
    except OSError:
        return False


@contextlib.contextmanager
def published(target: Any) -> Iterator[Any]:
    """Gives a directory that takes the target's name when all is well, and else goes.

    What killed exports of that target left goes as well.

    Args:
        target: the name, as a path object.
    """
    for left in exports_in(target.parent, target.name):
        with held(str(left)) as nobody_is_at_it:
            if nobody_is_at_it:
                leftovers.remove([str(left)])
    with _hidden(target) as directory:
        try:
            yield directory
            found = [*map(str, directory.iterdir()), str(directory)]
            sync_all(lambda: found, str(directory), timeout_s=_TIMEOUT_S)
            directory.rename(target)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    sync_all(lambda: [str(target.parent)], str(target.parent), timeout_s=_TIMEOUT_S)


@contextlib.contextmanager
def _hidden(target: Any) -> Iterator[Any]:
    while True:
        directory = target.with_name(f".{target.name}.exporting-{secrets.token_hex(4)}")
        directory.mkdir()
        with held(str(directory)) as is_mine:
            # Another export of that target may have taken it for one that was left.
            if is_mine:
                yield directory
                return
