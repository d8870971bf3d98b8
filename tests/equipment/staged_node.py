"""A node, as the library has it, that tells the test of each stage, and goes on when it may."""

from __future__ import annotations

import functools
import os
import signal
import threading
from multiprocessing.connection import Client

from equipment.hosts_zygote import HOST, NETWORK

from lazy_orbax.tiers.parity import node, node_process, peer


def main() -> None:
    connection, lock = Client(os.environ[NETWORK]), threading.Lock()
    connection.send(("node", int(os.environ[HOST])))

    def reached(stage: str) -> None:
        with lock:
            connection.send(stage)
            connection.recv()

    node_process.Node = functools.partial(node.Node, reached=reached)  # type: ignore[misc]
    # It is the kernel that finds out who is silent: a slow machine is none.
    peer._SILENT_S = 2
    node_process.main()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
