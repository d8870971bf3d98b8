"""One exchange of a group, as one member sees it: from snapshots of the others to parity here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity import files, stripes
from lazy_orbax.tiers.parity.errand import Errand, digest_in_chunks
from lazy_orbax.tiers.parity.files import Key, Member
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.shelf import Shelf

# For another process to come to the step that is asked for; and for an answer that needs no wait.
_STEP_S, _ANSWER_S = 30.0, 15.0
# What parity says of itself, and of each member.
_FACTS_BYTES, _MEMBER_BYTES = 2**14, 512


class Exchange:
    """Makes parity of what the other members have of a step, and keeps it."""

    def __init__(
        self,
        settings: NodeSettings,
        key: Key,
        group: Sequence[tuple[int, str]],
        reached: Callable[[str], None],
    ):
        """Asks nobody yet.

        Args:
            settings: of this node.
            key: of which snapshots.
            group: process and address of each member.
            reached: called with the name of each stage.
        """
        self._settings, self._key, self._group = settings, key, list(group)
        self._shelf, self._reached = Shelf(settings.directory), reached
        self._place = [process for process, _ in group].index(settings.process)

    def run(self) -> int:
        """Does all of it. Returns the bytes that came.

        Raises:
            KeeperError: a member does not have that step, does not answer, or lies; or there is
                no room. Parity of the other snapshot here is as it was.
            OSError: there is no memory.
        """
        with Errand(self._settings) as errand:
            found = [self._asked(errand, i) for i in range(len(self._group))]
            self._reached("asked")
            sizes = [member.n_bytes for member in found]
            length = stripes.parity_bytes(sizes, self._place)
            run, process = self._settings.run, self._settings.process
            name = files.parity_place(self._shelf, run, process, self._key)
            begins, room = files.PARITY_BEGINS, _FACTS_BYTES + _MEMBER_BYTES * len(found)
            file = files.room_for(self._shelf, name, begins + length + room)
            with contextlib.closing(file):
                target = file.memory[begins : begins + length]
                members = self._pulled(errand, target, found)
                facts = json.dumps(self._facts(target, members)).encode()
                del target
                self._reached("pulled")
                file.seal(found[self._place].serial, b"{}", facts, end=begins + length)
        self._reached("sealed")
        return sum(
            self._bytes_of(sizes, owner) for owner in stripes.others(len(sizes), self._place)
        )

    def _bytes_of(self, sizes: Sequence[int], owner: int) -> int:
        first, end = stripes.stripe_of(sizes[owner], len(sizes), owner, self._place)
        return end - first

    def _asked(self, errand: Errand, place: int) -> Member:
        """Returns what a member has."""
        process, address = self._group[place]
        if place == self._place:
            mine = files.snapshot_of(self._shelf, self._settings.run, process, self._key)
            return Member(process, mine.n_bytes, mine.serial)
        told = {**dataclasses.asdict(self._key), "wait_s": _STEP_S}
        answer = errand.ask(address, told, timeout_s=_STEP_S + _ANSWER_S)
        try:
            member = Member(**answer)
            if member.process == process and member.n_bytes >= 0:
                return member
        except TypeError:
            pass
        raise KeeperError(f"{address} says {answer}, wanted a snapshot of process {process}")

    def _pulled(self, errand: Errand, target: np.ndarray, found: list[Member]) -> list[Member]:
        """Adds up the stripes. Returns the members, with the digests of these."""
        sizes, members = [member.n_bytes for member in found], list(found)

        def pull(owner: int) -> stripes.Parts:
            told = {"what": "exchange", "process": found[owner].process, "n": len(found)}
            told |= {**dataclasses.asdict(self._key), "owner": owner, "holder": self._place}
            stripe = errand.pull(self._group[owner][1], told, self._bytes_of(sizes, owner))
            yield from stripe
            members[owner] = dataclasses.replace(found[owner], digest=stripe.digest)
            self._reached("stripe")

        stripes.make_parity(target, sizes, self._place, pull)
        return members

    def _facts(self, target: np.ndarray, members: list[Member]) -> dict[str, object]:
        return {
            "run": self._settings.run,
            **dataclasses.asdict(self._key),
            "process": self._settings.process,
            "written_s": time.time(),
            "parity_bytes": target.size,
            "parity_digest": digest_in_chunks(target),
            "members": [dataclasses.asdict(member) for member in members],
        }
