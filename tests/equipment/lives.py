"""A game of lives: machines that are lost, replaced and come back, and jobs that begin again there.

All of it is in one thread: who does what, and in which order, the game says. Files, votes, parity
and the choice of a step are the library's; networks, clocks and JAX's collectives are the game's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from equipment.kept import plan_of

from lazy_orbax._orbax import multihost
from lazy_orbax.errors import KeeperError
from lazy_orbax.pods import consensus
from lazy_orbax.tiers import newest, slots
from lazy_orbax.tiers.kept_layout import layout_of
from lazy_orbax.tiers.kept_tree import KeptTree
from lazy_orbax.tiers.parity import exchange, files, guard, mend, restoring, survey
from lazy_orbax.tiers.parity.errand import Incoming
from lazy_orbax.tiers.parity.serving import Serving
from lazy_orbax.tiers.parity.settings import NodeSettings, Parity
from lazy_orbax.tiers.parity.transport import CHUNK_BYTES
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.slot import Writing
from lazy_orbax.tiers.slots import Slots
from lazy_orbax.timeline import RestoreRecorder

RUN, ITEM = "/runs/lives", "default"
TREE = {"a": np.zeros(300, np.uint32)}
PLAN = plan_of(TREE)
LAYOUT = layout_of(PLAN, TREE)
(PIECE,) = (piece for slab in PLAN.slabs for piece in slab.pieces)
Told = dict[str, Any]


class Gone(KeeperError):
    """Whoever is asked is not there."""


class _Store:
    """JAX's key-value store, of one job. Nobody waits: what is not there yet is late."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool) -> None:
        self._values[key] = value

    def key_value_delete(self, key: str) -> None:
        self._values.pop(key, None)

    def blocking_key_value_get(self, key: str, timeout_s: float) -> str:
        if key not in self._values:
            raise TimeoutError(key)
        return self._values[key]


class Machine:
    """A shelf, with a clock that goes as it likes."""

    def __init__(self, directory: str, clock_ns: int):
        self.directory, self.clock_ns = directory, clock_ns


class _Node:
    """A node without a network."""

    def __init__(self, world: World, settings: NodeSettings):
        self._settings, self.is_gone = settings, False
        self.address = f"node{len(world.nodes)}"
        self.serving = Serving(settings)
        world.nodes[self.address] = self

    def ask(self, message: Told, *, timeout_s: float) -> Told:
        if self.is_gone:
            raise Gone("the node is gone")
        message = json.loads(json.dumps(message))
        if message["do"] == "exchange":
            key, group = files.Key.told(message), [tuple(one) for one in message["group"]]
            made = exchange.Exchange(self._settings, key, group, lambda _: None)
            return {"received_bytes": made.run(), "seconds": 0.0}
        if message["do"] == "lost":
            self.serving.announced.tell(files.Key.told(message), is_there=False)
        if message["do"] == "mend":
            mend.make_whole(self._settings, survey.Lost.told(message["lost"]), lambda _: None)
        return {}

    def close(self) -> None:
        self.is_gone = True
        self.serving.close()


class _Errand:
    """Asks other nodes by a call."""

    def __init__(self, world: World):
        self._world = world

    def _serving(self, address: str) -> Serving:
        node = self._world.nodes[address]
        if node.is_gone:
            raise Gone(f"{address} does not answer")
        return node.serving

    def ask(self, address: str, told: Told, *, timeout_s: float) -> Told:
        return self._serving(address).answer({**told, "wait_s": 0})

    def pull(self, address: str, told: Told, n_bytes: int) -> Incoming:
        def chunks() -> Iterator[tuple[memoryview, int]]:
            for at in range(0, n_bytes, CHUNK_BYTES):
                read = self._serving(address).read
                digest, chunk = read(told, at, min(at + CHUNK_BYTES, n_bytes))
                yield chunk, digest

        return Incoming(chunks())

    def __enter__(self) -> _Errand:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class World:
    """Everything that the library asks of the world."""

    def __init__(self, monkeypatch: Any, seed: int):
        self.random = random.Random(seed)
        self.nodes: dict[str, _Node] = {}
        self.process, self.n, self.clock_ns = 0, 1, 0
        self.waiting: list[Callable[[], Any]] = []
        self.store, self._above = _Store(), tempfile.mkdtemp(prefix="lo-", dir="/dev/shm")
        self._made = 0
        patch = monkeypatch.setattr
        patch(jax, "process_index", lambda *_: self.process)
        patch(jax, "process_count", lambda *_: self.n)
        patch(time, "time_ns", lambda: self.clock_ns)
        patch(multihost, "key_value_store", lambda: self.store)
        patch(guard, "NodeLink", functools.partial(_Node, self))
        patch(exchange, "Errand", lambda _: _Errand(self))
        patch(mend, "Errand", lambda _: _Errand(self))
        patch(files, "room_for", self._room_for)
        run = lambda work, _: self.waiting.append(work)  # noqa: E731
        patch(slots, "threads", types.SimpleNamespace(run=run))
        patch(slots, "secrets", types.SimpleNamespace(randbelow=self.random.randrange))

    def _room_for(self, shelf: Shelf, file: str, n_bytes: int) -> files.SnapshotFile:
        shelf.make_room(file, n_bytes, 2**28)
        opened = files.SnapshotFile(shelf.path_of(file), n_bytes)
        opened.break_seal()
        return opened

    def machine(self) -> Machine:
        """Returns a new machine, with nothing on it."""
        self._made += 1
        # Clocks differ by more than a life lasts.
        clock_ns = self.random.randrange(10**12, 10**12 + 10**10)
        return Machine(f"{self._above}/{self._made}", clock_ns)

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()
        shutil.rmtree(self._above)


class Process:
    """A process of a job, on a machine."""

    def __init__(self, world: World, machine: Machine, index: int, group: int):
        self.machine, self.index, self._world = machine, index, world
        self.waiting: list[Callable[[], Any]] = []
        self.shelf = Shelf(machine.directory)
        ask = lambda told: self.shelf.make_room(told["file"], told["n_bytes"], 2**28)  # noqa: E731
        link: Any = types.SimpleNamespace(ask=ask, keep_up=lambda: None)
        with self.here():
            parity = Parity(group=group, host="h", secret="s" * 16, domain=f"{index}")
            self.guard = guard.Guard(parity, self.shelf, RUN)
            self.guard.run = self.waiting.append  # type: ignore[method-assign]
            self.slots = Slots(self.shelf, link, RUN, self.guard)
        self.writing: Writing | None = None

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """What is called inside takes itself for this process."""
        self._world.process, self._world.clock_ns = self.index, self.machine.clock_ns
        self._world.waiting = self.waiting
        yield

    def begin(self, step: int) -> None:
        """Begins a snapshot, or passes over it."""
        with self.here():
            self.slots.offer(step, ITEM)
            self.writing = self.slots.begin(step, ITEM, LAYOUT, {})

    def end(self, content: np.ndarray | None) -> None:
        """Ends the snapshot that was begun; `None`: it fails."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        with self.here():
            if content is not None:
                writing.put(PIECE, content)
                # The node is told at once, while others are still to be asked.
                key = files.Key(ITEM, writing.step, self.slots.life)
                if not writing._is_over and self.guard.report.group:
                    self.guard.link().serving.announced.tell(key, is_there=True)  # type: ignore[attr-defined]
            writing.finish()

    def settle(self) -> None:
        """Does one of the things that wait."""
        work = self.waiting.pop(0)
        with self.here():
            work()


def content_of(value: int, process: int) -> np.ndarray:
    """Returns what a process has of a state."""
    return np.random.default_rng((value, process)).integers(0, 2**32, 300, np.uint32)


def at_each(processes: list[Process], ask: Callable[[Process], int]) -> list[int]:
    """Returns what each process would tell in JAX's collectives."""
    found = []
    for process in processes:
        with process.here():
            found.append(ask(process))
    return found


class _Told(Exception):
    pass


def begin_lives(
    monkeypatch: Any, processes: list[Process], restored: list[dict[str, str] | None]
) -> int:
    """Has all processes begin a life, together. Returns which."""

    def tells(number: int) -> int:
        raise _Told(number)

    def told(process: Process) -> int:
        try:
            process.slots.begin_life()
        except _Told as one:
            return one.args[0]
        raise AssertionError("it asked nobody")

    with monkeypatch.context() as patch:
        patch.setattr(consensus, "highest", tells)
        numbers = at_each(processes, told)
        patch.setattr(consensus, "highest", lambda _: max(numbers))
        for process, files_of_it in zip(processes, restored, strict=True):
            with process.here():
                process.slots.begin_life(files_of_it)
    (life,) = {process.slots.life for process in processes}
    return life


def restored(processes: list[Process]) -> tuple[tuple[int, int] | None, list[Any]]:
    """Restores as `restore_newest` does. Returns the step and life, and the files of each."""
    listings, n = [], len(processes)
    for process in processes:
        with process.here():
            listings.append(json.loads(json.dumps(process.guard.listing())))
    for plan in survey.plans(listings, [ITEM], None)[0][: restoring._MOST_PLANS]:
        if all(_is_made(processes, lost) for lost in plan.lost):
            break
    nothing = restoring.MadeWhole()
    targets, at_hand = {ITEM: None}, []
    for process in processes:
        keeper: Any = types.SimpleNamespace(slots=process.slots, run=RUN)
        with process.here():
            at_hand.append(newest._at_hand(keeper, nothing)[0])
    with processes[0].here():
        candidates = newest._candidates(at_hand[0], targets)
    for step, life in candidates:
        own = []
        for process, here in zip(processes, at_hand, strict=True):
            with process.here():
                items = here.get((step, life), {})
                if not items.get(ITEM) or not _has_all(items[ITEM], process, n):
                    break
                own.append(newest._own_files(items, targets))
        else:
            return (step, life), own
    return None, [None] * n


def _is_made(processes: list[Process], lost: survey.Lost) -> bool:
    process = processes[lost.at]
    with process.here():
        try:
            process.guard.link().ask({"do": "mend", "lost": lost.as_message()}, timeout_s=1)
        except KeeperError:
            return False
    return True


def _has_all(snapshots: list[Any], process: Process, n: int) -> bool:
    has = {one.facts["process"] for one in snapshots}
    wants = survey._wants(snapshots[0].facts["processes"], n)
    return all(one in has for at, one in wants if at == process.index)


def values_of(process: Process, step: int, life: int) -> dict[int, np.ndarray]:
    """Returns what a process would restore of each process that there was."""
    keeper: Any = types.SimpleNamespace(slots=process.slots, run=RUN)
    with process.here():
        here, _ = newest._at_hand(keeper, restoring.MadeWhole())
        return {
            one.facts["process"]: KeptTree([one]).restored(
                None, RestoreRecorder(""), on_devices=False
            )["a"]
            for one in here[step, life][ITEM]
        }
