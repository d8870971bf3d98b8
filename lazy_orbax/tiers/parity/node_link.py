"""The way from a trainer to its node: a program of its own, told what to do through a pipe."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
from typing import Any

import lazy_orbax
from lazy_orbax.errors import KeeperError
from lazy_orbax.storage import threads
from lazy_orbax.tiers import messages
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.shelf import Shelf

_PROGRAM = "lazy_orbax.tiers.parity.node_process"
_START_S, _END_S = 60.0, 30.0
# What takes long, and has an end.
_WORK = ("exchange", "mend")
_ROOT = str(pathlib.Path(lazy_orbax.__file__).parent.parent)


class NodeLink:
    """A node that works for this process.

    Invariant, under the lock: `_asked` has what was asked and not answered, by its number; once
    `_is_gone`, nothing is added. Whoever writes to the node holds `_writing`.

    Attributes:
        address: where other nodes reach it.
    """

    def __init__(self, settings: NodeSettings):
        """Starts the node.

        Raises:
            KeeperError: it could not be started.
        """
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._writing = threading.Lock()
        self._asked: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._is_gone = False
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(Shelf(settings.directory).log, flags, 0o600)
        try:
            self._program = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        except OSError as error:
            raise KeeperError(f"no node could be started: {error}") from error
        finally:
            os.close(log)
        assert self._program.stdin is not None
        os.set_blocking(self._program.stdin.fileno(), False)
        first = self._asked[0] = concurrent.futures.Future()
        self._reading = threads.run(self._read, "lazy_orbax-node")
        try:
            self._write(dataclasses.asdict(settings), _START_S)
            self.address = str(first.result(_START_S)["address"])
        except (KeeperError, OSError) as error:
            self.close()
            raise KeeperError(f"no node could be started: {error or 'it says nothing'}") from error

    @property
    def is_gone(self) -> bool:
        """Whether the node has ended."""
        return self._is_gone

    def _write(self, message: dict[str, Any], timeout_s: float) -> None:
        """Writes a message. A node that was stopped reads none, and the pipe is full at last.

        Raises:
            TimeoutError: it could not be written in time.
            OSError: the node is gone.
        """
        assert self._program.stdin is not None
        pipe, left = self._program.stdin.fileno(), messages.encoded(message)
        n_bytes, end_s, room = len(left), time.monotonic() + timeout_s, select.poll()
        room.register(pipe, select.POLLOUT)
        if not self._writing.acquire(timeout=timeout_s):
            raise TimeoutError
        try:
            while left and room.poll(max(0.0, 1000 * (end_s - time.monotonic()))):
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(pipe, left) :]
        finally:
            self._writing.release()
        if left:
            if len(left) < n_bytes:  # It would take the next message for the rest of this one.
                self._kill()
            raise TimeoutError

    def ask(self, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Returns the answer to a message, which may take the node a while. Several may ask.

        A node that does not come to the end of its work in time hangs. It is ended, so that
        another one takes its place.

        Raises:
            KeeperError: the node could not do it, is gone, or did not answer in time.
        """
        future: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        end_s = time.monotonic() + timeout_s
        with self._lock:
            if self._is_gone:
                raise KeeperError("the node is gone")
            number = next(self._numbers)
            self._asked[number] = future
        try:
            self._write({**message, "id": number}, timeout_s)
            return future.result(max(0.0, end_s - time.monotonic()))
        except TimeoutError as error:
            if message["do"] in _WORK:
                self._kill()
            raise KeeperError(f"the node did not answer within {timeout_s:.0f} s") from error
        except (OSError, ValueError) as error:
            raise KeeperError(f"the node is gone: {error}") from error
        finally:
            with self._lock:
                self._asked.pop(number, None)

    def _read(self) -> None:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            answer = messages.decoded(line)
            with self._lock:
                future = self._asked.pop(answer.pop("id"), None)
            if future is not None and "error" in answer:
                future.set_exception(KeeperError(answer["error"]))
            elif future is not None:
                future.set_result(answer)
        with self._lock:
            self._is_gone = True
            left = list(self._asked.values())
            self._asked.clear()
        for future in left:
            future.set_exception(KeeperError("the node is gone"))

    def _kill(self) -> None:
        """Ends the node at once, also one that was stopped."""
        self._program.kill()
        with contextlib.suppress(TimeoutError):
            self._reading.result(_END_S)

    def close(self) -> None:
        """Ends the node."""
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        with contextlib.suppress(OSError):
            self._program.stdin.close()
        # A child that this process forked may hold the pipe open.
        self._program.terminate()
        try:
            self._program.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._program.kill()
            self._program.wait()
        with contextlib.suppress(TimeoutError):
            self._reading.result(_END_S)
        self._program.stdout.close()
