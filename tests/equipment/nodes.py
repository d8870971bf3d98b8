"""Several machines on this one: each has a shelf, a keeper in a thread, and a node of a group."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lazy_orbax.tiers import messages
from lazy_orbax.tiers.keeper_link import connected
from lazy_orbax.tiers.keeper_process import KeeperProcess, KeeperSettings
from lazy_orbax.tiers.parity import files, survey
from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.node import Node
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.shelf import Shelf, file_of
from lazy_orbax.tiers.snapshot_file import PAGE_BYTES, SnapshotFile

LIMIT_BYTES = 2**24
RUN, ITEM, LIFE, SECRET = "/runs/a", "default", 7, "known to the job alone"


def key_of(step: int) -> Key:
    return Key(ITEM, step, LIFE)


def written(
    shelf: Shelf,
    make_room: Callable[[str, int], None],
    whose: tuple[int, int],
    step: int,
    content: bytes,
) -> str:
    """Writes a snapshot as a trainer does: alternately into two files. Returns its path.

    Args:
        shelf: where.
        make_room: makes a file of so many bytes.
        whose: of which process, of how many.
        step: the step.
        content: of its leaves.
    """
    file = file_of(RUN, ITEM, whose[0], step % 2)
    n_bytes = PAGE_BYTES + len(content) + 2**14
    make_room(file, n_bytes)
    opened = SnapshotFile(shelf.path_of(file), n_bytes)
    opened.break_seal()
    opened.memory[PAGE_BYTES : PAGE_BYTES + len(content)] = np.frombuffer(content, np.uint8)
    facts = {"run": RUN, "item": ITEM, "step": step, "life": LIFE}
    facts |= {"process": whose[0], "processes": whose[1]}
    opened.seal(step, b"{}", json.dumps(facts).encode(), end=PAGE_BYTES + len(content))
    opened.close()
    return shelf.path_of(file)


class Machine:
    """A shelf with its keeper, and a node for one process."""

    def __init__(self, directory: str, process: int, n: int, **settings: Any):
        self.process, self._n = process, n
        self.shelf = Shelf(directory)
        more = KeeperSettings(directory=directory, limit_bytes=LIMIT_BYTES, linger_s=600.0)
        self._thread = threading.Thread(target=KeeperProcess(self.shelf, more).serve)
        self._thread.start()
        settings = {"secret": SECRET, "timeout_s": 20.0, **settings}
        self.settings = NodeSettings(directory, RUN, process, **settings)
        self.node = Node(self.settings)

    def write(self, step: int, content: bytes) -> str:
        """Writes a snapshot. Returns its path."""
        make_room = functools.partial(self.shelf.make_room, limit_bytes=LIMIT_BYTES)
        return written(self.shelf, make_room, (self.process, self._n), step, content)

    def bytes_at(self, step: int) -> bytes:
        """Returns all of a snapshot, from its seal to its facts."""
        found = files.snapshot_of(self.shelf, RUN, self.process, key_of(step))
        return pathlib.Path(found.path).read_bytes()[: found.n_bytes]

    def listing(self) -> dict[str, Any]:
        return {**files.listing_of(self.shelf, RUN), "address": self.node.address}

    def close(self) -> None:
        self.node.close()
        with contextlib.suppress(OSError), connected(self.shelf.path) as peer:
            messages.asked(peer, {"do": "stop", "discard": True}, timeout_s=30)
        self._thread.join(30)
        assert not self._thread.is_alive()


class Machines:
    """A job of so many processes, each on a machine of its own, in one group."""

    def __init__(self, n: int, **settings: Any):
        self._above, self._n = tempfile.mkdtemp(prefix="lo-", dir="/dev/shm"), n
        self._settings, self._made = settings, 0
        self.all: list[Machine] = []
        for process in range(n):
            self.all.append(self._machine(process))

    def _machine(self, process: int) -> Machine:
        self._made += 1
        return Machine(f"{self._above}/{self._made}", process, self._n, **self._settings)

    def lose(self, process: int) -> Machine:
        """Takes a machine away with its memory, and puts an empty one in its place."""
        lost = self.all[process]
        lost.close()
        shutil.rmtree(lost.shelf.path, ignore_errors=True)
        self.all[process] = self._machine(process)
        return lost

    @property
    def group(self) -> list[tuple[int, str]]:
        return [(one.process, one.node.address) for one in self.all]

    def write(self, step: int, contents: Sequence[bytes]) -> list[bytes]:
        for machine, content in zip(self.all, contents, strict=True):
            machine.write(step, content)
        return [machine.bytes_at(step) for machine in self.all]

    def each(self, work: Callable[[Machine], Any]) -> list[Any]:
        """Runs something on all machines at once. Returns what came of it, errors too."""

        def outcome(machine: Machine) -> Any:
            try:
                return work(machine)
            except Exception as error:  # noqa: BLE001 - It is what the test looks at.
                return error

        with concurrent.futures.ThreadPoolExecutor(self._n) as pool:
            return list(pool.map(outcome, self.all))

    def exchange(self, step: int) -> list[Any]:
        group = self.group
        return self.each(lambda machine: machine.node.exchange(key_of(step), group))

    def plans(self) -> tuple[list[survey.Plan], dict[int, str]]:
        return survey.plans([one.listing() for one in self.all], [ITEM], None)

    def mend(self, plan: survey.Plan) -> None:
        for lost in plan.lost:
            message = json.loads(json.dumps(lost.as_message()))
            self.all[lost.at].node.make_whole(survey.Lost.told(message))


@contextlib.contextmanager
def machines(n: int, **settings: Any) -> Iterator[Machines]:
    """Yields machines, which end with the block."""
    found = Machines(n, **settings)
    try:
        yield found
    finally:
        for machine in found.all:
            machine.close()
        shutil.rmtree(found._above, ignore_errors=True)
