"""Small disks that can be filled, or made to refuse. They need root and are skipped without."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

MIB = 2**20


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(kind: str, at: pathlib.Path, n_bytes: int) -> Iterator[pathlib.Path]:
    """Mounts an empty file system of `n_bytes`: `tmpfs` or `ext4`. Skips where it cannot be."""
    at.mkdir()
    try:
        if kind == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(at))
        else:
            image = at.with_suffix(".image")
            image.write_bytes(b"")
            os.truncate(image, n_bytes)
            # No journal: it would take a part of a disk as small as this.
            _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
            _run("mount", "-o", "loop", str(image), str(at))
    except OSError as error:
        pytest.skip(f"no {kind} can be mounted here: {error}")
    try:
        yield at
    finally:
        _run("umount", "-l", str(at))


def remount(place: pathlib.Path, how: str) -> None:
    """Makes a disk read-only, `ro`, or writable again, `rw`."""
    _run("mount", "-o", f"remount,{how}", str(place))


def free_bytes(place: pathlib.Path) -> int:
    """Returns how much can still be written."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def filled(disk: pathlib.Path, leave_bytes: int) -> Iterator[None]:
    """Fills a disk but for `leave_bytes`, and empties it again."""
    balloon = disk / "balloon"
    try:
        with balloon.open("wb") as file:
            piece = free_bytes(disk)
            while piece >= 4096:
                end = os.fstat(file.fileno()).st_size
                if piece > free_bytes(disk) - leave_bytes:
                    piece //= 2
                    continue
                try:
                    os.posix_fallocate(file.fileno(), end, piece)
                except OSError:
                    piece //= 2
        yield
    finally:
        balloon.unlink()


def temporary(directory: pathlib.Path) -> list[str]:
    """Returns what carries Orbax's mark of what is temporary."""
    return sorted(str(path) for path in directory.rglob("*orbax-checkpoint-tmp*"))


def bytes_in(directory: pathlib.Path) -> int:
    """Returns what a directory takes on its disk."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def have_compiler() -> str | None:
    """Returns a C compiler."""
    return shutil.which("cc") or shutil.which("gcc")
