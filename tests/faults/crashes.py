"""Processes that die, and disks whose power is cut, at every call of a save; and what must hold."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import assert_same
from faults.crash_state import make_state

import lazy_orbax

_HERE = pathlib.Path(__file__).parent
_TIMEOUT_S = 90
KILLED = -9


def build(directory: pathlib.Path) -> pathlib.Path | None:
    """Compiles the interposer. Returns `None` where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = directory / "fscalls.so"
    flags = ["-O1", "-shared", "-fPIC", "-o", str(library)]
    source = str(_HERE / "fscalls.c")
    subprocess.run([compiler, *flags, source, "-ldl", "-lpthread"], check=True, timeout=_TIMEOUT_S)
    return library


class Zygote:
    """A process that forks others, each of which saves one step and dies in it."""

    def __init__(self, library: pathlib.Path):
        paths = [str(_HERE.parent), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        self._log = library.parent / "log"
        self._errors = (library.parent / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "crash_zygote.py")],
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._answer() == {"threads": 1}, "a fork of it would not be whole"

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._said()
        return json.loads(line)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def _do(self, root: pathlib.Path, step: int, **how: Any) -> int:
        """Returns how a fork ended that saves."""
        request = {"root": str(root), "step": step, "stock": False, "durable_path": False, **how}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()["status"]

    def save(self, root: pathlib.Path, step: int, **how: Any) -> None:
        """Saves a step and lives."""
        assert self._do(root, step, **how) == 0, self._said()

    def die(self, root: pathlib.Path, step: int, death: dict[str, Any], **how: Any) -> list[str]:
        """Saves a step and dies.

        Args:
            root: the run's directory.
            step: what to save.
            death: the fields of `crash_zygote.Death`.
            **how: `stock`, `durable_path`, `v1` or `linked`, as of `crash_zygote.save`.

        Returns:
            The calls that began. The last of them was not made, unless it is `finished`.
        """
        status = self._do(root, step, death={"log": str(self._log), **death}, **how)
        calls = self._log.read_text().splitlines()
        assert "the power was not cut" not in calls
        # Another thread may see that the disk is gone before the process is killed.
        saw_it = death.get("cut") and calls[-1] == death.get("call")
        assert status == KILLED or saw_it, f"{death}: {status}\n{self._said()}"
        return calls

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(_TIMEOUT_S)
        self._process.stdout.close()
        self._errors.close()


def published(calls: list[str], step: int) -> bool:
    """Whether the step was renamed to its final name."""
    return f"rename /{step}" in calls[:-1]


def wanted(step: int, *, frozen: bool = False) -> Any:
    """Returns the state of a step, on the host."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    return jax.tree.map(np.asarray, make_state(step, mesh, frozen=frozen))


def stock_lists(root: pathlib.Path) -> list[int]:
    """Returns the steps that stock Orbax lists."""
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        return list(manager.all_steps())


def stock_restores(root: pathlib.Path, *steps: int, frozen: bool = False) -> dict[int, str]:
    """Returns which steps stock Orbax does not restore bit for bit, and why."""
    wrong = {}
    with ocp.CheckpointManager(root, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        for step in steps:
            try:
                restored = manager.restore(step)
                assert_same(jax.tree.map(np.asarray, restored), wanted(step, frozen=frozen))
            except Exception as error:  # noqa: BLE001 - Orbax's own, of many types.
                wrong[step] = f"{type(error).__name__}: {error}"[:300]
    return wrong


def save_again(root: pathlib.Path, step: int) -> None:
    """Saves another step as a new process does, and restores it with stock Orbax."""
    options = lazy_orbax.LazyOptions(mode="direct", slab_bytes=2**20)
    handler = lazy_orbax.standard_handler(options=options)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    with ocp.CheckpointManager(root, item_handlers=handler) as manager:
        manager.save(step, args=ocp.args.StandardSave(make_state(step, mesh)))
        manager.wait_until_finished()
    assert step in stock_lists(root)
    assert stock_restores(root, step) == {}


class Disk:
    """A file system of its own in a file, mounted."""

    def __init__(self, directory: pathlib.Path, kind: str, *options: str):
        self.mounted, self._image, self._kind = directory / "disk", directory / "image", kind
        twins = ["nouuid"] if kind == "xfs" else []  # Two of one name: see `after_the_cut`.
        self._options = ",".join(["loop", *twins, *options])
        self.mounted.mkdir()
        with self._image.open("wb") as image:
            image.truncate(320 * 2**20)  # The least that xfs takes.
        flags = ["-q", "-F"] if kind == "ext4" else ["-q", "-f"]
        _run(f"mkfs.{kind}", *flags, str(self._image))
        # Unmounts what is left when the tests are killed: its standard input ends with them.
        self._janitor = subprocess.Popen(
            ["sh", "-c", 'read -r _; umount -l "$0" 2>&1', str(self.mounted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.mount()
        except subprocess.CalledProcessError:
            self.dismiss_janitor()
            raise

    def dismiss_janitor(self) -> None:
        """Ends the process that would unmount it."""
        self._janitor.communicate(timeout=_TIMEOUT_S)

    def mount(self) -> None:
        """Mounts it, which replays its journal."""
        _run("mount", "-t", self._kind, "-o", self._options, str(self._image), str(self.mounted))

    def _is_shut_down(self) -> bool:
        probe = self.mounted / "probe"
        try:
            probe.touch()
            probe.unlink()
        except OSError:
            return True
        return False

    def unmount(self) -> None:
        """Unmounts it, and frees its loop device."""
        _run("umount", str(self.mounted))

    def replace(self, source: pathlib.Path) -> pathlib.Path:
        """Makes a copy of `source` all that is on the disk, and durable. Returns where it is."""
        for path in self.mounted.iterdir():
            if path.name != "lost+found":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(source, self.mounted / source.name)
        _run("sync", "-f", str(self.mounted))
        return self.mounted / source.name

    def cut_power(self, interposer: pathlib.Path, *, late: bool) -> None:
        """Cuts its power; if `late`, after somebody has synced a file of theirs."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            assert not ctypes.CDLL(str(interposer)).cut_power(descriptor, late)
        finally:
            os.close(descriptor)

    def after_the_cut(self, root: pathlib.Path, copy: pathlib.Path) -> None:
        """Mounts it again, and copies what is left of `root`: so nobody keeps the disk busy."""
        self.unmount()
        self.mount()
        if self._is_shut_down():
            # A mount namespace that somebody made meanwhile keeps it as it was: mount its twin.
            self.unmount()
            twin = self._image.with_name(f"{self._image.name}+")
            _run("cp", "--sparse=always", str(self._image), str(twin))
            self._image = twin
            self.mount()
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)


@contextlib.contextmanager
def disk(directory: pathlib.Path, kind: str, *options: str) -> Iterator[Disk]:
    """Mounts a new file system for a while.

    Raises:
        Unable: this is not allowed here.
    """
    if shutil.which(f"mkfs.{kind}") is None:
        raise Unable(f"mkfs.{kind} is not installed")
    try:
        new = Disk(directory, kind, *options)
    except subprocess.CalledProcessError as error:
        raise Unable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
    try:
        yield new
    finally:
        try:
            new.unmount()
        except subprocess.CalledProcessError:
            _run("umount", "-l", str(new.mounted))
            raise
        finally:
            new.dismiss_janitor()


@contextlib.contextmanager
def disk_or_skip(directory: pathlib.Path, kind: str) -> Iterator[Disk]:
    """Mounts a new file system for a while, or skips the test where that is not allowed.

    Args:
        directory: where it is.
        kind: of the file system, and options to mount it with, divided by spaces.
    """
    try:
        with disk(directory, *kind.split()) as new:
            yield new
    except Unable as reason:
        pytest.skip(f"a disk cannot be mounted here: {reason}")


class Unable(Exception):
    """Something that the machine does not let us do."""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
