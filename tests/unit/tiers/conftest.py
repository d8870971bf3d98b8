"""A keeper that a thread serves, in a directory in memory of its own."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator

import pytest

from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.keeper_process import KeeperProcess, KeeperSettings
from lazy_orbax.tiers.shelf import Shelf


@pytest.fixture
def place() -> Iterator[str]:
    """A directory for a keeper that is not there yet. The path of a socket must be short."""
    above = pathlib.Path(tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"))
    yield str(above / "k")
    shutil.rmtree(above)


@pytest.fixture
def served(place: str) -> Iterator[str]:
    """The same, with a keeper."""
    shelf = Shelf(place)
    settings = KeeperSettings(directory=place, limit_bytes=2**28, linger_s=600.0)
    keeper = KeeperProcess(shelf, settings)
    thread = threading.Thread(target=keeper.serve, name="keeper")
    thread.start()
    yield place
    if not keeper.is_over:
        with connected(place) as peer:
            messages.asked(peer, {"do": "stop", "discard": True}, timeout_s=30)
    thread.join(30)
    assert not thread.is_alive()
