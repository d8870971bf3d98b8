"""What a keeper and those it serves say to each other: short lines of JSON over a Unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from typing import Any, NamedTuple

from lazy_orbax.errors import KeeperError

LONGEST_BYTES = 2**16
"""A longer message is not read: whoever sends it is cut off."""
_CREDENTIALS = struct.Struct("3i")


class Door(NamedTuple):
    """Where clients come in.

    Attributes:
        listener: takes connections.
        path: of the socket.
        inode: which socket it is, whatever is there later.
    """

    listener: socket.socket
    path: str
    inode: int

    @classmethod
    def opened(cls, path: str, *, most: int) -> Door:
        """Listens at a path, for so many clients at once."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # Of a keeper that died: nobody else may have the lock.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(most)
        listener.setblocking(False)
        return cls(listener, path, os.stat(path).st_ino)

    def is_found(self) -> bool:
        """Whether a client would find it."""
        try:
            return os.stat(self.path).st_ino == self.inode
        except OSError:
            return False


def user_of(peer: socket.socket) -> int:
    """Returns the user whose process is at the other end, as the kernel says."""
    told = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(told)[1]


def refuse_strangers(peer: socket.socket) -> None:
    """Refuses to talk to a process of another user.

    Raises:
        KeeperError: it is one.
    """
    user = user_of(peer)
    if user != os.geteuid():
        raise KeeperError(f"a process of user {user} is there, wanted user {os.geteuid()}")


def encoded(message: dict[str, Any]) -> bytes:
    """Returns a message as it is sent.

    Raises:
        KeeperError: it is too long.
    """
    content = json.dumps(message).encode() + b"\n"
    if len(content) > LONGEST_BYTES:
        raise KeeperError(f"a message of {len(content)} bytes, wanted at most {LONGEST_BYTES}")
    return content


def decoded(line: bytes) -> dict[str, Any]:
    """Returns a message.

    Raises:
        KeeperError: it is none.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise KeeperError(f"a message that is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise KeeperError(f"a message that is {type(message).__name__}, wanted an object")
    return message


def asked(peer: socket.socket, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Sends a message and returns the answer.

    Args:
        peer: a connection on which nothing else is under way.
        message: what to say.
        timeout_s: most seconds that all of it may take.

    Raises:
        KeeperError: the answer is that this is refused.
        OSError: the other end is gone, or too slow, or does not speak like a keeper.
    """
    deadline_s = time.monotonic() + timeout_s
    peer.settimeout(timeout_s)
    peer.sendall(encoded(message))
    answer = b""
    while not answer.endswith(b"\n"):
        peer.settimeout(max(0.001, deadline_s - time.monotonic()))
        part = peer.recv(LONGEST_BYTES)
        if not part:
            raise ConnectionResetError("it hung up")
        answer += part
        if len(answer) > LONGEST_BYTES:
            raise ConnectionError("its answer is too long")
    try:
        found = decoded(answer)
    except KeeperError as error:
        raise ConnectionError(f"it sent {error}") from error
    if "error" in found:
        raise KeeperError(str(found["error"]))
    return found
