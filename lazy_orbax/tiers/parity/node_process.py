"""The program that is a node: it works for one trainer, beside it, and ends when that does.

The trainer says what to do in lines of JSON, and hears of each when it is done. What was kept stays
on the shelf: the node of the next life of the job serves it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import select
import signal
import sys
import threading
from typing import Any

from lazy_orbax.errors import KeeperError
from lazy_orbax.storage import threads
from lazy_orbax.tiers import messages
from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.node import Node
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.parity.survey import Lost

_LOG = logging.getLogger("lazy_orbax")
# How long one that leaves lets the others fetch what they need of it.
_LEAVE_S = 10.0


class Desk:
    """Takes what the trainer says, and does each in a thread of its own.

    Invariant, under the lock: one line is written at a time.
    """

    def __init__(self, settings: NodeSettings, out: int):
        """Opens the node, and says where it listens.

        Args:
            settings: of the node.
            out: the descriptor to answer at.
        """
        self._node, self._out, self._lock = Node(settings), out, threading.Lock()
        self._last: tuple[Key, int] | None = None
        self._say({"id": 0, "address": self._node.address})

    def take(self, line: bytes) -> None:
        """Begins what a line says."""
        message = json.loads(line)
        threads.run(functools.partial(self._answer, message), f"lazy_orbax-{message['do']}")

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            answer = self._do(message)
        except (KeeperError, OSError, ValueError) as error:
            answer = {"error": str(error) or repr(error)}
        except Exception as error:  # noqa: BLE001 - The trainer hears of it, and goes on.
            _LOG.exception("A node failed.")
            answer = {"error": repr(error)}
        self._say({"id": message["id"], **answer})

    def _do(self, message: dict[str, Any]) -> dict[str, Any]:
        what, announced = message["do"], self._node.serving.announced
        if what == "exchange":
            key, group = Key.told(message), [(int(p), str(a)) for p, a in message["group"]]
            self._last = None
            done = self._node.exchange(key, group)
            self._last = key, len(group) - 1
            return done
        if what == "lost":
            announced.tell(Key.told(message), is_there=False)
            return {}
        if what == "mend":
            self._node.make_whole(Lost.told(message["lost"]))
            return {}
        if what == "leave":
            if self._last is not None:
                announced.wait_until_served(*self._last, _LEAVE_S)
            return {}
        raise KeeperError(f"a node does not know how to do {what!r}")

    def _say(self, answer: dict[str, Any]) -> None:
        with self._lock:
            content = messages.encoded(answer)
            while content:
                content = content[os.write(self._out, content) :]


def main() -> None:
    """Serves until the trainer hangs up, or is gone."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    parent = os.getppid()
    received = b""
    while b"\n" not in received:
        received += (part := os.read(0, messages.LONGEST_BYTES))
        if not part:
            return
    line, _, received = received.partition(b"\n")
    told = json.loads(line)
    # A child that the trainer forked may hold the pipe when the trainer is gone.
    gone = os.pidfd_open(parent) if os.getppid() == parent else 0
    try:
        desk = Desk(NodeSettings(**told), 1)
    except (KeeperError, OSError) as error:
        os.write(1, messages.encoded({"id": 0, "error": str(error)}))
        return
    while True:
        *lines, received = received.split(b"\n")
        for line in lines:
            desk.take(line)
        ready = select.select([0, gone], [], [])[0]
        part = os.read(0, messages.LONGEST_BYTES) if ready == [0] else b""
        if not part:
            return
        received += part


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    # At once: calls of others may be under way, in threads that Python would wait for.
    os.kill(os.getpid(), signal.SIGTERM)
