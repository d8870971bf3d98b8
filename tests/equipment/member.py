"""A process of a job that keeps snapshots, but trains nothing: it has a keeper and a node."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
from typing import Any

from equipment.nodes import LIMIT_BYTES, RUN, SECRET, key_of, written

from lazy_orbax.tiers.keeper_link import KeeperLink
from lazy_orbax.tiers.keeper_process import KeeperSettings
from lazy_orbax.tiers.parity import files, node_link
from lazy_orbax.tiers.parity.node_link import NodeLink
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.snapshot_file import read_snapshot

_ANSWER_S = 100.0


class Member:
    """What the test tells to do, on the machine of this process."""

    def start(self, process: int, n: int, host: str, timeout_s: float) -> str:
        """Starts keeper and node. Returns the node's address."""
        node_link._PROGRAM = "equipment.staged_node"
        self._process, self._n, self._shelf = process, n, Shelf()
        settings = KeeperSettings(
            directory=self._shelf.path, limit_bytes=LIMIT_BYTES, linger_s=600.0
        )
        whose = {"run": RUN, "process": process, "pid": os.getpid()}
        whose |= {"complete_after_s": None, "tiers": []}
        self._keeper = KeeperLink(settings, whose)
        self._keeper.ask({"do": "status"})
        self._settings = NodeSettings(
            self._shelf.path, RUN, process, SECRET, host=host, timeout_s=timeout_s
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._node = NodeLink(self._settings)
        return self._node.address

    def restart_node(self) -> str:
        """Ends the node, as the end of a job does, and starts another. Returns its address."""
        self._node.close()
        self._node = NodeLink(self._settings)
        return self._node.address

    def write(self, step: int, content: bytes) -> bytes:
        """Writes a snapshot. Returns all bytes of it."""

        def make_room(file: str, n_bytes: int) -> None:
            self._keeper.ask({"do": "room", "file": file, "n_bytes": n_bytes})

        written(self._shelf, make_room, (self._process, self._n), step, content)
        return self.bytes_at(step)

    def bytes_at(self, step: int) -> bytes:
        found = files.snapshot_of(self._shelf, RUN, self._process, key_of(step))
        return pathlib.Path(found.path).read_bytes()[: read_snapshot(found.path).n_bytes]

    def begin(self, step: int, group: list[tuple[int, str]]) -> None:
        """Begins an exchange."""
        ask = {"do": "exchange", "group": group, **dataclasses.asdict(key_of(step))}
        ask_node = self._node.ask
        self._exchange = self._pool.submit(ask_node, ask, timeout_s=_ANSWER_S)

    def ended(self) -> dict[str, Any] | str:
        """Returns what came of the exchange, or why nothing."""
        error = self._exchange.exception(_ANSWER_S)
        return self._exchange.result() if error is None else str(error)

    def listing(self) -> dict[str, Any]:
        return {**files.listing_of(self._shelf, RUN), "address": self._node.address}

    def mend(self, lost: dict[str, Any]) -> None:
        self._node.ask({"do": "mend", "lost": lost}, timeout_s=_ANSWER_S)

    def files(self) -> list[str]:
        return self._shelf.files()
