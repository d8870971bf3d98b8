"""The way to a keeper: found, or started; asked, and never waited for without a limit."""

from __future__ import annotations

import json
import os
import pathlib
import select
import socket
import subprocess
import sys
import threading
import weakref
from typing import Any

import lazy_orbax
from lazy_orbax._members import members_of
from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_process import KeeperSettings
from lazy_orbax.tiers.shelf import Shelf

_START_S = 30.0
_ANSWER_S = 15.0
# Memory for a snapshot is cleared at some GB a second.
_ROOM_S = 120.0
_ROOT = str(pathlib.Path(lazy_orbax.__file__).parent.parent)


def start(settings: KeeperSettings) -> None:
    """Starts a keeper, if there is none, and returns when it listens.

    It is a program of its own, in a session of its own: nothing of this process's threads, devices
    or files comes with it.

    Raises:
        KeeperError: it could not be started.
    """
    shelf = Shelf(settings.directory)
    told = {"directory": shelf.path, "limit_bytes": settings.limit_bytes}
    told["linger_s"] = settings.linger_s
    command = [sys.executable, "-m", "lazy_orbax.tiers.keeper_process", json.dumps(told)]
    path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    log = os.open(shelf.log, flags, 0o600)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            timeout=_START_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KeeperError(f"no keeper could be started in {shelf.path}: {error}") from error
    finally:
        os.close(log)
    if done.returncode != 0 and not shelf.is_served:
        said = pathlib.Path(shelf.log).read_text(errors="replace").strip().splitlines()
        why = said[-1] if said else f"it ended with {done.returncode}"
        raise KeeperError(f"no keeper could be started in {shelf.path}: {why}")


class KeeperLink:
    """A connection to a keeper. Whoever asks waits for the answer, one at a time.

    Invariant, under the lock: `_peer` has said who this is, and nothing is under way on it.
    """

    def __init__(self, settings: KeeperSettings, whose: dict[str, Any]):
        """Connects to nobody yet.

        Args:
            settings: how to start a keeper where there is none.
            whose: what to say of this process: `run`, `process` and `pid`.
        """
        self._settings, self._whose = settings, whose
        self._lock = threading.Lock()
        self._peer: socket.socket | None = None
        _LINKS.add(self)

    def ask(self, message: dict[str, Any], *, starts: bool = True) -> dict[str, Any]:
        """Returns the answer to a message; starts a keeper if the last one is gone.

        Args:
            message: what is wanted.
            starts: whether to start a keeper where there is none.

        Raises:
            KeeperError: the keeper refused, or there is none.
        """
        timeout_s = _ROOM_S if message["do"] == "room" else _ANSWER_S
        with self._lock:
            try:
                if self._peer is not None:
                    return messages.asked(self._peer, message, timeout_s=timeout_s)
            except OSError:
                self._hang_up()  # It died since: another may have taken its place.
            self._connect(starts=starts)
            assert self._peer is not None
            try:
                return messages.asked(self._peer, message, timeout_s=timeout_s)
            except OSError as error:
                self._hang_up()
                raise KeeperError(f"the keeper does not answer: {error}") from error

    def keep_up(self) -> None:
        """Finds or starts another keeper if the last one is gone.

        It is to know that this process is there, also when it is asked for nothing.

        Raises:
            KeeperError: there is none.
        """
        with self._lock:
            if self._peer is None or _has_hung_up(self._peer):
                self._hang_up()
                self._connect(starts=True)

    def _connect(self, *, starts: bool) -> None:
        peer = None
        try:
            try:
                peer = connected(self._settings.directory)
            except OSError as error:
                if not starts:
                    raise KeeperError(f"there is no keeper: {error}") from error
                start(self._settings)
                peer = connected(self._settings.directory)
            messages.asked(peer, {"do": "hello", **self._whose}, timeout_s=_ANSWER_S)
            self._peer, peer = peer, None
        except OSError as error:
            raise KeeperError(f"the keeper does not answer: {error}") from error
        finally:
            if peer is not None:
                peer.close()

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        """Hangs up."""
        with self._lock:
            self._hang_up()


def _has_hung_up(peer: socket.socket) -> bool:
    poll = select.poll()
    poll.register(peer, 0)  # It always tells of an end.
    return bool(poll.poll(0))


def _hang_up_in_child() -> None:
    """Lets go of what a forked child has no use for. Else the keeper takes it for its parent."""
    for link in members_of(_LINKS):
        link._lock = threading.Lock()  # Perhaps a thread had it that is not here.
        link._hang_up()


_LINKS: weakref.WeakSet[KeeperLink] = weakref.WeakSet()
os.register_at_fork(after_in_child=_hang_up_in_child)


def connected(directory: str | None) -> socket.socket:
    """Returns a connection to the keeper of a directory.

    Raises:
        KeeperError: it is of another user.
        OSError: there is none.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(_ANSWER_S)
        peer.connect(Shelf(directory).socket)
        messages.refuse_strangers(peer)
    except BaseException:
        peer.close()
        raise
    return peer
