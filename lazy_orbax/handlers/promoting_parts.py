"""One step of a job on several machines goes to a tier that all of them share, each its part.

The program on the machine of process 0 leads. It calls the others, holds what is in its memory,
says which step is meant, and lets go when each has taken its part into memory of its own. Each
writes its part. The leader joins them when all are there, and lists the step. Whoever is late,
or killed, or of another file system, leaves nothing that is listed: all waiting has an end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence, Set
from typing import Any

from lazy_orbax import _paths
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers.completing import write
from lazy_orbax.handlers.promoting_share import Share, remove_late
from lazy_orbax.handlers.verified_path import verified_in
from lazy_orbax.save.part import Attempt, join_parts
from lazy_orbax.tiers.kept_steps import UNUSABLE, KeptStep, held_for, kept_steps
from lazy_orbax.tiers.meeting import Meeting, awaited
from lazy_orbax.tiers.promoted_steps import listed, newest_in, remove_unfinished
from lazy_orbax.tiers.shelf import Shelf
from lazy_orbax.tiers.snapshot_file import held
from lazy_orbax.tiers.tier import Machine

_LOG = logging.getLogger("lazy_orbax")
# How long programs wait for each other: to come; to take their parts into memory; to write them.
# A network file system may take a minute to show one machine what another has written.
MEET_S, TAKE_S, WRITE_S = 180.0, 180.0, 3600.0
# A step that one machine has whole may be on its way on another.
_SEALED_S = 20.0


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call, in which one step is brought to a tier.

    Attributes:
        meeting: where it is.
        token: which one.
        parts: of all machines.
    """

    meeting: Meeting
    token: str
    parts: tuple[int, ...]

    @property
    def attempt(self) -> Attempt:
        """The attempt at the step."""
        return Attempt(self.token, self.parts)

    def from_others(self, name: str, patience_s: float) -> dict[int, dict[str, Any]]:
        """Waits until all other machines have told something. Returns it by their numbers.

        Raises:
            KeeperError: one has given up, or tells nothing.
        """
        return self.meeting.told_by_each(self.token, name, set(self.parts) - {0}, patience_s)


def lead(run: str, tier: str, shelf: Shelf, machine: Machine) -> int | None:
    """Brings the newest step to a tier, together with the other machines. Process 0 is here.

    Args:
        run: the run.
        tier: its directory.
        shelf: where the snapshots are.
        machine: this one.

    Returns:
        The step; `None`: nothing is newer.

    Raises:
        KeeperError: a machine did not come, or has not the step.
        SaveError: the storage refused something.
        CorruptCheckpointError: what was read back is not what was written.
    """
    newest, meeting, steps = newest_in(tier), Meeting(tier), kept_steps(shelf, run)
    if all(kept.step <= newest for kept in steps):
        if meeting.clear(kept.life for kept in steps):  # Perhaps one was killed that had listed it.
            remove_unfinished(tier, run)
        return None
    with meeting.called({kept.life for kept in steps}) as token:
        remove_unfinished(tier, run)  # Not before: a later life may be at it.
        call = _Call(meeting, token, _gathered(meeting, token, machine))
        # Of what is held here no other machine gives up its part: not all have a newer one.
        with held_for(shelf, TAKE_S):
            kept, shares = _taken(kept_steps(shelf, run), machine, newest)
            items = sorted(shares)
            told = {"step": kept.step, "life": kept.life, "items": items, "parts": call.parts}
            meeting.tell(token, "step", told)
            call.from_others("taken", TAKE_S)
        handlers = {item: _joining(call, i, shares[item]) for i, item in enumerate(items)}
        write(
            tier,
            kept.step,
            {item: {} for item in items},
            handlers=handlers,
            create=True,
            enable_async_checkpointing=False,
            temporary_path_class=verified_in(
                tier, {"run": run}, lambda: _refuse_ended(meeting, token)
            ),
        )
        return kept.step


def _gathered(meeting: Meeting, token: str, machine: Machine) -> tuple[int, ...]:
    """Waits until each process is on a machine that has come. Returns the numbers of these."""

    def look() -> tuple[int, ...] | None:
        told = {part: one["processes"] for part, one in meeting.told_by_all(token, "here").items()}
        here = {machine.part: list(machine.processes), **told}
        processes = sorted(process for each in here.values() for process in each)
        if processes == list(range(machine.of)):
            return tuple(sorted(here))
        return meeting.refuse_ended(token)

    what = (
        f"the keepers of all {machine.of} processes did not come to {meeting.tier}: do all "
        "machines see one file system there, and one clock?"
    )
    return awaited(look, MEET_S, what)


def _taken(
    steps: Sequence[KeptStep], machine: Machine, newest: int
) -> tuple[KeptStep, dict[str, Share]]:
    """Returns the first step that can be used, and what this machine writes of each item."""
    reasons: list[str] = []
    for kept in (kept for kept in steps if kept.step > newest):
        try:
            kept.refuse_parts(machine.processes)
            return kept, {item: Share(snapshots) for item, snapshots in kept.items.items()}
        except UNUSABLE as error:
            reasons.append(f"step {kept.step}: {error}")
    raise KeeperError(f"no snapshot here is whole: {'; '.join(reasons) or 'none is newer'}")


def _joining(call: _Call, number: int, share: Share) -> ocp.PyTreeCheckpointHandler:
    """Returns a stock handler that saves an item in parts, whatever it is given."""
    handler = ocp.PyTreeCheckpointHandler()

    async def save(directory: Any, *_: Any, **__: Any) -> None:
        place = str(directory)
        here = place.removeprefix(f"{call.meeting.tier}/")
        call.meeting.tell(call.token, f"item{number}", {"directory": here})
        await share.write_strings(directory)
        told = {0: share.write(place, call.attempt, 0)}
        others = call.from_others(f"done{number}", WRITE_S)
        told |= {part: one["digest"] for part, one in others.items()}
        join_parts(place, call.attempt, told, share.shapes)

    handler.async_save = save
    handler.finalize = lambda directory: None  # The parts are joined.
    return handler


def follow(run: str, tier: str, shelf: Shelf, machine: Machine) -> int | None:
    """Writes the part of this machine when the leader calls. Process 0 is elsewhere.

    The arguments, and what it returns, are those of `lead`.

    Raises:
        KeeperError: nobody called, the step is not here, or the leader did not list it.
        SaveError: the storage refused something.
    """
    newest, meeting, steps = newest_in(tier), Meeting(tier), kept_steps(shelf, run)
    if all(kept.step <= newest for kept in steps):
        return None
    lives, over = {kept.life for kept in steps}, list[str]()
    while True:
        token, told = _heard(meeting, lives, machine, over)
        over.append(token)
        try:
            with _giving_up(meeting, token, machine):
                _write_part(run, shelf, machine, _Call(meeting, token, tuple(told["parts"])), told)
        except _EndedError:
            if meeting.token(lives) is None:
                raise
            continue  # It was of a leader that was killed, and there is another one.
        if told["step"] in dict(listed(tier)):
            return told["step"]
        if meeting.token(lives) is None:
            what = f"the machine of process 0 did not list step {told['step']}; see its log"
            raise KeeperError(what)


def _write_part(
    run: str, shelf: Shelf, machine: Machine, call: _Call, told: dict[str, Any]
) -> None:
    """Writes the part of this machine, and waits for the end of the call."""
    meeting, token, part = call.meeting, call.token, machine.part
    shares = _shares_of(shelf, run, told, machine)
    meeting.tell(token, f"taken-{part}", {"step": told["step"]})
    for number, item in enumerate(told["items"]):
        directory = _directory_of(meeting, token, number)
        try:
            digest = shares[item].write(directory, call.attempt, part)
            _refuse_ended(meeting, token)
        except BaseException:
            remove_late(directory, call.attempt, part)
            raise
        meeting.tell(token, f"done{number}-{part}", {"digest": digest})
    awaited(lambda: meeting.token() != token or None, WRITE_S, "the leader did not end its call")


def _heard(
    meeting: Meeting, lives: Set[int], machine: Machine, over: list[str]
) -> tuple[str, dict[str, Any]]:
    """Answers calls until one says which step is meant. One may be of a leader that was killed.

    Args:
        meeting: where they are.
        lives: those of which snapshots are here; a job that went on elsewhere has others.
        machine: this one.
        over: calls not to be heard. It gets those in which a program of this machine was killed.
    """
    answered: list[str] = []

    def look() -> tuple[str, dict[str, Any]] | None:
        token = meeting.token(lives)
        if token is None and answered:
            raise KeeperError("the machine of process 0 has given up, see its log")
        if token is None or token in over:
            return None
        if token not in answered:
            answered.append(token)
            if meeting.told(token, f"taken-{machine.part}") is not None:
                over.append(token)
                meeting.tell(token, f"lost-{machine.part}", {"why": "its program was killed"})
                return None
            meeting.tell(token, f"here-{machine.part}", {"processes": machine.processes})
        return (token, told) if (told := meeting.told(token, "step")) is not None else None

    what = (
        f"the keeper of process 0 did not say in {meeting.tier} which step is meant: do all "
        "machines see one file system there, and one clock?"
    )
    return awaited(look, MEET_S + TAKE_S, what)


class _EndedError(KeeperError):
    """The leader has given up what is at hand."""


@contextlib.contextmanager
def _giving_up(meeting: Meeting, token: str, machine: Machine) -> Iterator[None]:
    """Tells the leader when something fails, so that it waits no longer."""
    try:
        yield
    except Exception as error:
        if meeting.token() == token:
            meeting.tell(token, f"lost-{machine.part}", {"why": str(error)})
        raise


def _shares_of(shelf: Shelf, run: str, told: dict[str, Any], machine: Machine) -> dict[str, Share]:
    wanted = told["step"], told["life"], told["items"]

    def look() -> dict[str, Share] | None:
        for kept in kept_steps(shelf, run):
            if (kept.step, kept.life, sorted(kept.items)) != wanted:
                continue
            with contextlib.suppress(*UNUSABLE), held(kept.paths):
                kept.refuse_other()
                kept.refuse_parts(machine.processes)
                return {item: Share(snapshots) for item, snapshots in kept.items.items()}
        return None

    what = f"step {told['step']} did not get whole in {shelf.path} for {list(machine.processes)}"
    return awaited(look, _SEALED_S, what)


def _directory_of(meeting: Meeting, token: str, number: int) -> str:
    def look() -> dict[str, Any] | None:
        _refuse_ended(meeting, token)
        return meeting.told(token, f"item{number}")

    told = awaited(look, WRITE_S, "the leader did not begin")["directory"]
    directory = f"{meeting.tier}/{told}"
    if not _paths.is_in(directory, meeting.tier):  # Others may write what is told in a tier.
        raise KeeperError(f"the leader said {told!r}, which is not in {meeting.tier}")
    return directory


def _refuse_ended(meeting: Meeting, token: str) -> None:
    """Refuses to go on in a call that has ended.

    Raises:
        _EndedError: it has.
    """
    if meeting.token() != token:
        raise _EndedError("the machine of process 0 has given this step up")
