"""What the programs of several machines tell each other that bring one step to one tier.

They share nothing but the tier. Whoever has the first process of the job calls the others, in a
file of the tier, and every call has a token of its own. What is told in a call is told once, in a
file that is there whole or not at all. It works in an object store as in a shared file system.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, NamedTuple, TypeVar

from lazy_orbax import _paths
from lazy_orbax.errors import KeeperError
from lazy_orbax.save.part import remove_folder
from lazy_orbax.storage.places import place_of

_CALL = "call"
_TOKEN = r"[0-9a-f]{16}"
_LOOK_S = 0.2
# Nobody tells as much: whatever is larger, a stranger put there.
_MOST_BYTES = 2**20
# No call lasts as long: the parts of an item are waited for an hour.
_STALE_S = 6 * 3600.0
_T = TypeVar("_T")


class _Call(NamedTuple):
    """A call, or that there is none.

    Attributes:
        token: which one; `None`: there is none.
        lives: of the job, which it means.
        called_s: when it was called, in seconds since 1970.
    """

    token: str | None = None
    lives: frozenset[int] = frozenset()
    called_s: float = 0.0

    def is_after(self, lives: Iterable[int]) -> bool:
        """Whether it is of a later life, and somebody may still be at it."""
        is_fresh = abs(time.time() - self.called_s) <= _STALE_S  # What is no number is not.
        return is_fresh and max(self.lives, default=-1) > max(lives, default=-1)


class Meeting:
    """Where the programs of a tier's machines meet."""

    def __init__(self, tier: str):
        """Makes nothing yet.

        Args:
            tier: the directory, or its address.
        """
        self.tier = tier
        self._place = place_of(f"{tier}/{_paths.MEETING}")

    @contextlib.contextmanager
    def called(self, lives: Iterable[int]) -> Iterator[str]:
        """Calls the others. Yields the token of the call, which ends with the block.

        Args:
            lives: of the job: whoever has snapshots of none of them is not meant.

        Raises:
            KeeperError: there is a call of a later life: the job has gone on elsewhere.
        """
        token, lives, before = secrets.token_hex(8), sorted(lives), self._call()
        if before.is_after(lives):
            raise KeeperError(
                f"other machines bring a later life of the job to {self.tier}; what is here is of "
                f"an earlier one. If they are gone too, remove {self.tier}/{_paths.MEETING}, or "
                f"wait: after {_STALE_S / 3600:.0f} h they are taken to be gone"
            )
        self._write(_CALL, {"token": token, "lives": lives, "called_s": time.time()})
        if before.token is not None:  # Of one that was killed, or of an earlier life.
            remove_folder(self._place, before.token)
        try:
            yield token
        finally:
            if self.token() == token:
                self._clear()

    def clear(self, lives: Iterable[int]) -> bool:
        """Removes all that was told, and ends a call that is going on, unless it is a later one.

        Args:
            lives: of the job, of which snapshots are here.

        Returns:
            Whether nobody of a later life is at it.
        """
        if self._call().is_after(lives):
            return False
        self._clear()
        return True

    def _clear(self) -> None:
        remove_folder(place_of(self.tier), _paths.MEETING)

    def token(self, lives: Set[int] | None = None) -> str | None:
        """Returns the token of the call that is going on.

        Args:
            lives: of which of them it is to be; `None`: it may be another job's.
        """
        call = self._call()
        return call.token if lives is None or call.lives & lives else None

    def _call(self) -> _Call:
        """Returns the call that is going on."""
        # It names a folder that is removed: anything else that stands there is no call.
        match self._read(_CALL):
            case {"token": str(token), "lives": [*lives], "called_s": float(called_s)} if (
                re.fullmatch(_TOKEN, token)
            ):
                return _Call(token, frozenset(one for one in lives if type(one) is int), called_s)
        return _Call()

    def tell(self, token: str, name: str, told: dict[str, Any]) -> None:
        """Tells something in a call. It can be told nothing else under this name.

        Args:
            token: the call.
            name: under which it is told.
            told: JSON values.

        Raises:
            KeeperError: the storage refused it. Of a call that has ended nobody hears any more.
        """
        try:
            self._write(f"{token}/{name}", told)
        except KeeperError:  # Its folder may be going at this moment.
            if self.token() == token:
                raise

    def told(self, token: str, name: str) -> dict[str, Any] | None:
        """Returns what was told in a call under a name."""
        return self._read(f"{token}/{name}")

    def told_by_all(self, token: str, name: str) -> dict[int, dict[str, Any]]:
        """Returns what was told under `NAME-N`, by the number N."""
        found = {}
        for each in self._place.names(token):
            start, _, number = each.rpartition("-")
            if start == name and number.isdecimal() and (told := self.told(token, each)):
                found[int(number)] = told
        return found

    def told_by_each(
        self, token: str, name: str, numbers: Set[int], patience_s: float
    ) -> dict[int, dict[str, Any]]:
        """Waits until `NAME-N` was told for each number N. Returns what was told, by the number.

        Args:
            token: the call.
            name: under which it is told.
            numbers: of those who are to tell it.
            patience_s: most seconds to wait.

        Raises:
            KeeperError: one told `lost-N`, or nothing, or the call has ended.
        """

        def look() -> dict[int, dict[str, Any]] | None:
            for number, told in self.told_by_all(token, "lost").items():
                raise KeeperError(f"the machine of process {number} gave up: {told.get('why')}")
            found = self.told_by_all(token, name)
            if numbers <= set(found):
                return found
            return self.refuse_ended(token)

        return awaited(look, patience_s, f"a machine did not tell of `{name}`")

    def refuse_ended(self, token: str) -> None:
        """Refuses to wait in a call that another one has ended.

        Raises:
            KeeperError: it has.
        """
        if self.token() != token:
            raise KeeperError(f"another program calls the machines that bring steps to {self.tier}")

    def _write(self, name: str, told: dict[str, Any]) -> None:
        try:
            self._place.kvstore.write(name, json.dumps(told).encode()).result()
        except ValueError as error:
            raise KeeperError(f"nothing can be told in {self.tier}: {error}") from error

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            if self._place.has_special_files and self._is_strange(name):
                return None
            found = self._place.kvstore.read(name).result()
        except (ValueError, OSError) as error:
            raise KeeperError(f"nothing can be heard in {self.tier}: {error}") from error
        if found.state != "value":
            return None
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(found.value)
            return told if isinstance(told, dict) else None
        return None

    def _is_strange(self, name: str) -> bool:
        """Whether nobody told this: of a pipe, or of a huge file, there is no end."""
        try:
            size = self._place.size(name) if self._place.has(name) else 0
        except FileNotFoundError:  # It went meanwhile.
            return False
        return size is None or size > _MOST_BYTES


def awaited(look: Callable[[], _T | None], patience_s: float, what: str) -> _T:
    """Looks until there is something.

    Args:
        look: returns it; `None`: not yet.
        patience_s: most seconds to look.
        what: did not come, for the message.

    Raises:
        KeeperError: nothing came.
    """
    deadline_s = time.monotonic() + patience_s
    while (found := look()) is None:
        if time.monotonic() > deadline_s:
            raise KeeperError(f"{what} within {patience_s:.0f} s")
        time.sleep(_LOOK_S)
    return found
