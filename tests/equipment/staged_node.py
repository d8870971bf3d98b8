"""A node, as the library has it, that tells the test of each stage, and goes on when it may."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from multiprocessing.connection import Client

from equipment.hosts_zygote import HOST, NETWORK

from lazy_orbax.tiers.parity import errand, node, node_process, peer


class Clock:
    """The clock by which a node gives up, which the test may set on."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


def main() -> None:
    connection, lock = Client(os.environ[NETWORK]), threading.Lock()
    connection.send(("node", int(os.environ[HOST])))

    clock = Clock()

    def reached(stage: str) -> None:
        with lock:
            connection.send(stage)
            clock.ahead_s += connection.recv() or 0.0

    node_process.Node = functools.partial(node.Node, reached=reached)  # type: ignore[misc]
    # It is the kernel that finds out who is silent: a slow machine is none.
    peer._SILENT_S = 2
    peer.time = errand.time = clock  # type: ignore[assignment]
    node_process.main()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
