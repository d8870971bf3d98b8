"""A member of groups: it serves what it has, makes parity of the others, and makes lost ones again.

It asks for what it needs: who is asked sends, and nobody takes memory because a stranger says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lazy_orbax.tiers.parity.exchange import Exchange
from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.mend import make_whole
from lazy_orbax.tiers.parity.serving import Serving
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.parity.survey import Lost
from lazy_orbax.tiers.parity.transport import Server


class Node:
    """One of the members of a group. Its methods may be called from any thread.

    Attributes:
        serving: what it gives to the others.
        reached: called with the name of each stage of its work; for tests.
    """

    def __init__(self, settings: NodeSettings, reached: Callable[[str], None] = lambda _: None):
        """Listens.

        Raises:
            KeeperError: it cannot listen where it is told to.
        """
        self._settings, self.reached = settings, reached
        self.serving, self._exchanging = Serving(settings), threading.Lock()
        answer, read = self.serving.answer, self.serving.read
        self._server = Server(settings.host, settings.secret, settings.tls, answer, read)

    @property
    def address(self) -> str:
        """Where the others reach it."""
        return self._server.address

    def exchange(self, key: Key, group: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Makes parity of what the other members have of a step, and keeps it.

        Args:
            key: of which snapshots.
            group: process and address of each member.

        Returns:
            `received_bytes`, and the `seconds` that it took.

        Raises:
            KeeperError: a member does not have that step, does not answer, or lies; or there is
                no room. Parity of the other snapshot here is as it was.
            OSError: there is no memory.
        """
        began_s = time.monotonic()
        self.serving.announced.tell(key, is_there=True)
        with self._exchanging:
            received = Exchange(self._settings, key, group, self.reached).run()
        return {"received_bytes": received, "seconds": time.monotonic() - began_s}

    def make_whole(self, lost: Lost) -> None:
        """Makes a snapshot that this machine does not have.

        Args:
            lost: which, and how.

        Raises:
            KeeperError: somebody does not answer, or lies; or there is no room.
            OSError: there is no memory.
        """
        make_whole(self._settings, lost, self.reached)

    def close(self) -> None:
        """Ends every call, and listens no more."""
        self.serving.close()
        self._server.close()
