"""What a trainer has of parity: its node, its group, and what became of each exchange."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import jax

from lazy_orbax._orbax import multihost
from lazy_orbax.errors import KeeperError
from lazy_orbax.pods.consensus import value_in_time
from lazy_orbax.storage import threads
from lazy_orbax.tiers.parity import files
from lazy_orbax.tiers.parity.addresses import interface_towards
from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.groups import group_with, groups_of
from lazy_orbax.tiers.parity.node_link import NodeLink
from lazy_orbax.tiers.parity.proof import new_secret
from lazy_orbax.tiers.parity.settings import NodeSettings, Parity
from lazy_orbax.tiers.shelf import GENERATIONS, Shelf, parity_file_of

_LOG = logging.getLogger("lazy_orbax")
_PREFIX = "lazy_orbax/parity"
_JOIN_S, _ANSWER_S, _LEAVE_S = 120.0, 30.0, 30.0
# After so many exchanges in a row that failed, snapshots without parity count as those before did:
# else a job whose network is down would go back further and further after an ordinary crash.
_MOST_IN_VAIN = 3


@dataclasses.dataclass(frozen=True)
class ProtectionReport:
    """What became of the parity of one process so far.

    Attributes:
        group: the processes of its group; empty: nothing is protected, and `error` says why.
        protected: exchanges that came to their end here.
        failed: exchanges that failed: the snapshots of their steps have no parity here.
        newest_step: the step of the newest one that came to its end.
        seconds: how long that took.
        received_bytes: what came from the other members, in all.
        error: why the last one failed, if it did.
    """

    group: tuple[int, ...] = ()
    protected: int = 0
    failed: int = 0
    newest_step: int | None = None
    seconds: float = 0.0
    received_bytes: int = 0
    error: str | None = None


class Guard:
    """Sees to it that the snapshots of a process have parity on other machines.

    Invariant, under the lock: `report` counts each exchange once; `_link` is a node that was alive
    when it was last looked at; `_under_way` has what is not known to have ended.

    Attributes:
        report: what became of the exchanges so far.
        store: JAX's key-value store; `None` where there is one process.
    """

    def __init__(self, parity: Parity, shelf: Shelf, run: str):
        """Starts the node, and tells the others where it is. Every process of a job must.

        Raises:
            KeeperError: the node cannot be started.
        """
        self.report = ProtectionReport()
        self.store: Any = None
        self._shelf, self._lock = shelf, threading.RLock()
        self._parity, self._in_vain = parity, 0
        self._under_way: list[concurrent.futures.Future[Any]] = []
        self._link: NodeLink | None = None
        self._settings = NodeSettings(shelf.path, run, jax.process_index(), new_secret())
        if jax.process_count() > 1:
            self.store = multihost.key_value_store()
            self._settings = dataclasses.replace(
                self._settings,
                secret=parity.secret or self._common_secret(),
                host=parity.host or _own_interface(),
                bytes_per_s=parity.bytes_per_s,
                timeout_s=float(parity.timeout_s),
                tls=parity.tls,
            )
            self.link()
            self._put(f"domain/{self._settings.process}", parity.domain_here)

    @property
    def settings(self) -> NodeSettings:
        """What its node knows."""
        return self._settings

    def _put(self, name: str, value: str) -> None:
        if self.store is not None:
            self.store.key_value_set(f"{_PREFIX}/{name}", value, allow_overwrite=True)

    def _get(self, name: str, timeout_s: float = _JOIN_S) -> str:
        value = value_in_time(self.store, f"{_PREFIX}/{name}", timeout_s)
        if value is None:
            raise KeeperError(f"no process said within {timeout_s:.0f} s what {name} of parity is")
        return value

    def _common_secret(self) -> str:
        if jax.process_index() == 0:
            self._put("secret", new_secret())
        return self._get("secret")

    def link(self) -> NodeLink:
        """Returns the node; another one if the last one is gone.

        Raises:
            KeeperError: none can be started.
        """
        with self._lock:
            if self._link is None or self._link.is_gone:
                if self._link is not None:
                    self._link.close()
                self._link = NodeLink(self._settings)
                self._put(f"address/{self._settings.process}", self._link.address)
            return self._link

    def join(self) -> None:
        """Finds its group, when every process has told of its domain. Every process must."""
        try:
            if self.store is None:
                raise KeeperError("there is one process, and nobody to keep parity for it")
            if self._settings.process == 0:
                self._deal()
            told = json.loads(self._get(f"group/{self._settings.process}"))
            if isinstance(told, str):
                raise KeeperError(told)
            self.report = dataclasses.replace(self.report, group=tuple(told))
        except KeeperError as error:
            _LOG.warning("Snapshots in memory have no parity: %s.", error)
            self.report = dataclasses.replace(self.report, error=str(error))

    def _deal(self) -> None:
        """Makes the groups, and tells each process of its own."""
        n = jax.process_count()
        try:
            domains = [self._get(f"domain/{process}") for process in range(n)]
            groups = groups_of(domains, self._parity.group)
            told: list[Any] = [group_with(groups, process) for process in range(n)]
        except KeeperError as error:
            told = [str(error)] * n
        for process in range(n):
            self._put(f"group/{process}", json.dumps(told[process]))

    def exchange(self, key: Key) -> bool:
        """Makes parity of a step of all members. Returns whether it came to its end here."""
        group = self.report.group
        if not group:
            return True
        try:
            link = self.link()
            members = [[one, self._get(f"address/{one}", _ANSWER_S)] for one in group]
            ask = {"do": "exchange", "group": members, **dataclasses.asdict(key)}
            done = link.ask(ask, timeout_s=2 * self._settings.timeout_s + _ANSWER_S)
        except (KeeperError, jax.errors.JaxRuntimeError) as error:
            self._failed(key.step, error)
            return False
        with self._lock:
            self._in_vain = 0
            self.report = dataclasses.replace(
                self.report,
                protected=self.report.protected + 1,
                newest_step=key.step,
                seconds=done["seconds"],
                received_bytes=self.report.received_bytes + done["received_bytes"],
                error=None,
            )
        return True

    def _failed(self, step: int, error: Exception) -> None:
        with self._lock:
            self._in_vain += 1
            self.report = dataclasses.replace(
                self.report, failed=self.report.failed + 1, error=str(error)
            )
        _LOG.warning("Step %d has no parity: %s", step, error)

    @property
    def is_in_vain(self) -> bool:
        """Whether so many exchanges have failed that nobody waits for parity any more."""
        return self._in_vain >= _MOST_IN_VAIN

    def lost(self, key: Key) -> None:
        """Tells the others that there will be no snapshot here of a step."""
        if self.report.group:
            self.link().ask({"do": "lost", **dataclasses.asdict(key)}, timeout_s=_ANSWER_S)

    def run(self, work: Callable[[], Any]) -> None:
        """Runs something in the background that `wait` waits for."""
        with self._lock:
            self._under_way = [one for one in self._under_way if not one.done()]
            self._under_way.append(threads.run(work, "lazy_orbax-parity"))

    def wait(self, timeout_s: float | None) -> None:
        """Waits until nothing is under way any more."""
        with self._lock:
            under_way = list(self._under_way)
        concurrent.futures.wait(under_way, timeout_s)

    def files(self, items: list[str]) -> list[str]:
        """Returns the names of this process's files of parity."""
        whose = self._settings.run, self._settings.process
        names = {
            parity_file_of(whose[0], item, whose[1], i)
            for item in items
            for i in range(GENERATIONS)
        }
        return sorted(names & set(self._shelf.files()))

    def is_of_as_many(self, key: Key) -> bool:
        """Whether this process has a snapshot, of a job of as many processes as this one."""
        try:
            whose = self._settings.run, self._settings.process
            found = files.snapshot_of(self._shelf, *whose, key)
        except KeeperError:
            return False
        return found.facts["processes"] == jax.process_count()

    def forget_before(self, item: str, life: int) -> None:
        """Removes what this machine has of processes that it has no more, of earlier lives.

        Everybody has a step of this life: nobody goes back before it.
        """
        for file in files.of_others(self._shelf, self._settings, item, life):
            self._shelf.remove(file)

    def listing(self) -> dict[str, Any]:
        """Returns what this machine has of the run, and where it is asked for that."""
        found = files.listing_of(self._shelf, self._settings.run)
        # A job of one process asks its own node, if what it has is parity of a larger one.
        is_asked = self.store is not None or found["parities"]
        return {**found, "address": self.link().address if is_asked else ""}

    def close(self) -> None:
        """Lets the others fetch what they need, and ends the node."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            try:
                link.ask({"do": "leave"}, timeout_s=_LEAVE_S)
            except KeeperError as error:
                _LOG.info("The node cannot be told that this process leaves: %s", error)
            link.close()


def _own_interface() -> str:
    address = multihost.coordinator_address()
    if address is None:
        raise KeeperError(
            "it is not known where JAX's coordinator is, and so on which interface to listen; give "
            "`Parity(host=...)`"
        )
    return interface_towards(address)
