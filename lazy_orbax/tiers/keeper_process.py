"""The keeper: a small process that has the memory of snapshots, and outlives those who take them.

It imports no JAX, and runs one thread that never waits for one client alone. A client says who it
is, asks for room, tells when a snapshot is whole, and leaves. One whose connection ends before it
left has died: its snapshots stay, until somebody comes back or `linger_s` is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers import messages
from lazy_orbax.tiers.completion import Completions
from lazy_orbax.tiers.promotion import Promotions
from lazy_orbax.tiers.shelf import Shelf

_LOG = logging.getLogger("lazy_orbax")
_MOST_CLIENTS = 512
# How long a message may take from its first byte to its last; and the first one, to come.
_PATIENCE_S = 5.0
_IS_SERVED = 3
_LOOK_S = 0.05
# What a keeper must do without: it tells which of them it has imported.
_HEAVY = ("jax", "orbax", "tensorstore", "lazy_orbax.save")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeeperSettings:
    """How a keeper serves.

    Attributes:
        directory: where the snapshots are.
        limit_bytes: most bytes of snapshots.
        linger_s: how many seconds it keeps them for nobody.
    """

    directory: str
    limit_bytes: int
    linger_s: float


@dataclasses.dataclass(eq=False)
class Client:
    """Somebody at the other end of a connection.

    Attributes:
        peer: the connection.
        since_s: when it came, or when the message that it is at began; `None` between messages.
        received: what of a message has come.
        whose: what it said of itself; empty before.
    """

    peer: socket.socket
    since_s: float | None
    received: bytes = b""
    whose: dict[str, Any] = dataclasses.field(default_factory=dict)


class KeeperProcess:
    """Serves one directory until it is told to end, or nobody needs it any more.

    Attributes:
        clients: who is connected.
        is_over: whether it is to end.
    """

    def __init__(self, shelf: Shelf, settings: KeeperSettings, clock: Any = time.monotonic):
        """Listens.

        Args:
            shelf: the directory, whose lock this process has.
            settings: how to serve.
            clock: tells the seconds.
        """
        self._shelf, self._settings, self._clock = shelf, settings, clock
        self._door = messages.Door.opened(shelf.socket, most=_MOST_CLIENTS)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door.listener, selectors.EVENT_READ, None)
        self.clients: list[Client] = []
        self._alone_since_s = clock()
        self._programs = (Completions(shelf.path), Promotions(shelf))
        self.is_over = False

    def serve(self) -> None:
        """Serves until the end."""
        try:
            while not self.is_over:
                self.turn(timeout_s=1.0)
        finally:
            for client in list(self.clients):
                self._drop(client)
            for programs in self._programs:
                programs.close()
            self._selector.close()
            self._door.listener.close()

    def turn(self, *, timeout_s: float) -> None:
        """Does what there is to do, and waits for something at most so many seconds."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._accept()
            else:
                self._receive(key.data)
        now_s = self._clock()
        for client in list(self.clients):
            if client.since_s is not None and now_s - client.since_s > _PATIENCE_S:
                _LOG.warning("A client is cut off: it sent no whole message in %s s.", _PATIENCE_S)
                self._drop(client)
        runs = {client.whose["run"] for client in self.clients if client.whose}
        completions, promotions = self._programs
        if completions.turn(now_s, runs) or runs:
            self._alone_since_s = now_s
        is_late = now_s - self._alone_since_s > self._settings.linger_s
        if not promotions.turn(now_s, runs, is_late=is_late) and is_late:
            _LOG.warning("Nobody came back within %s s.", self._settings.linger_s)
            self._end(discard=True)
        if not self.is_over and not self._door.is_found():
            self._end(discard=False)

    def _accept(self) -> None:
        try:
            peer, _ = self._door.listener.accept()
        except OSError:  # It has gone already.
            return
        client = Client(peer, self._clock())
        try:
            messages.refuse_strangers(peer)
            if len(self.clients) >= _MOST_CLIENTS:
                raise KeeperError(f"there are {_MOST_CLIENTS} clients already")
        except (KeeperError, OSError) as error:
            _LOG.warning("A connection is refused: %s.", error)
            peer.close()
            return
        peer.setblocking(False)
        self.clients.append(client)
        self._selector.register(peer, selectors.EVENT_READ, client)

    def _receive(self, client: Client) -> None:
        try:
            part = client.peer.recv(messages.LONGEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._drop(client)
            return
        *lines, client.received = (client.received + part).split(b"\n")
        if client.since_s is None or lines:
            client.since_s = self._clock() if client.received or not client.whose else None
        if max(map(len, (*lines, client.received))) > messages.LONGEST_BYTES:
            _LOG.warning("A client is cut off: its message is too long.")
            self._drop(client)
            return
        for line in lines:
            if client in self.clients:
                self._answer(client, line)

    def _answer(self, client: Client, line: bytes) -> None:
        try:
            message = messages.decoded(line)
            answer = self._do(client, message)
        except (KeeperError, OSError) as error:
            answer = {"error": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": f"a message that is not understood: {error!r}"}
        if client.whose and not client.received:
            client.since_s = None
        try:
            # It fits the socket's buffer; who lets that fill up is no client of ours.
            if client.peer.send(content := messages.encoded(answer)) != len(content):
                self._drop(client)
        except OSError:
            self._drop(client)

    def _do(self, client: Client, message: dict[str, Any]) -> dict[str, Any]:
        what = message["do"]
        if what == "hello":
            client.whose = {
                "run": str(message["run"]),
                "process": int(message["process"]),
                "pid": int(message["pid"]),
            }
            completions, promotions = self._programs
            completions.came(client.whose["run"], message.get("complete_after_s"))
            promotions.came(client.whose["run"], message.get("tiers") or (), self._clock())
            return {"limit_bytes": self._settings.limit_bytes, "pid": os.getpid()}
        if what == "room":
            file, n_bytes = message["file"], int(message["n_bytes"])
            self._shelf.make_room(file, n_bytes, self._settings.limit_bytes)
            return {"n_bytes": n_bytes}
        if what == "leave":
            for file in message["discard"]:
                self._shelf.remove(file)
            run, client.whose = client.whose.get("run"), {}
            # The others of its pod may still need it.
            if run is not None and all(other.whose.get("run") != run for other in self.clients):
                for programs in self._programs:
                    programs.left(run)
            others = any(other.whose for other in self.clients)
            if not others and not self._shelf.files():
                self._end(discard=True)
            return {}
        if what == "status":
            return self._status()
        if what == "stop":
            self._end(discard=bool(message["discard"]))
            return {}
        raise KeeperError(f"nobody knows how to do {what!r}")

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "limit_bytes": self._settings.limit_bytes,
            "linger_s": self._settings.linger_s,
            "used_bytes": self._shelf.used_bytes(),
            "clients": [client.whose for client in self.clients if client.whose],
            "completing": self._programs[0].pending,
            "tiers": self._programs[1].told(),
            "heavy": [name for name in _HEAVY if name in sys.modules],
        }

    def _end(self, *, discard: bool) -> None:
        self.is_over = True
        if discard:
            self._shelf.remove_all()

    def _drop(self, client: Client) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self._selector.unregister(client.peer)
            client.peer.close()
            if client.whose:
                _LOG.warning("Process %s of %s is gone.", *_named(client.whose))


def _named(whose: dict[str, Any]) -> tuple[str, str]:
    return f"{whose['process']} (pid {whose['pid']})", whose["run"]


def _lock_of(shelf: Shelf) -> int | None:
    """Returns the lock, also of a keeper that is just ending; `None` where one listens."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while (lock := shelf.lock()) is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as peer:
            peer.connect(shelf.socket)
            return None
        time.sleep(_LOOK_S)
    return lock


def main(arguments: list[str]) -> int:
    """Becomes the keeper, in a process of its own that lives on. Returns the exit status.

    It returns when the keeper listens: 0; or when there is one already: 3.

    Args:
        arguments: the settings as JSON.
    """
    settings = KeeperSettings(**json.loads(arguments[0]))
    shelf = Shelf(settings.directory)
    if (lock := _lock_of(shelf)) is None:
        return _IS_SERVED
    keeper = KeeperProcess(shelf, settings)
    # This process is fresh, and has one thread. The one that started it waits for it, not for that.
    if os.fork():
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the training.
    signal.signal(signal.SIGTERM, lambda *_: setattr(keeper, "is_over", True))
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    try:
        keeper.serve()
    finally:
        os.close(lock)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
