"""What is not on its machine is made whole there, before a restore looks at what there is."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable

import jax

from lazy_orbax.errors import KeeperError
from lazy_orbax.pods import consensus
from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.guard import Guard
from lazy_orbax.tiers.parity.survey import Lost, Plan, plans

_LOG = logging.getLogger("lazy_orbax")
_KEY = "lazy_orbax/parity-survey"
_TELL_S, _ANSWER_S = 120.0, 60.0
_MOST_PLANS = 4
# What a machine has that cannot tell.
_NOTHING = '{"snapshots": [], "parities": [], "address": ""}'


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """A snapshot that was not on its machine, and was made there.

    Attributes:
        item: of which item.
        step: of which step.
        process: of which process.
        n_bytes: its size.
        sources: the processes from whose snapshots and parity it was made; empty: another machine
            had all of it.
    """

    item: str
    step: int
    process: int
    n_bytes: int
    sources: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MadeWhole:
    """What became of the steps that were not whole everywhere.

    Attributes:
        rebuilt: what was made for the step that is whole now.
        missing: what could not be made, by step, and why.
    """

    rebuilt: tuple[Rebuilt, ...] = ()
    missing: tuple[tuple[int, str], ...] = ()


def make_whole(guard: Guard | None, items: Iterable[str], newer_than: int | None) -> MadeWhole:
    """Makes the newest step whole of which all is left that it takes. Every process must call this.

    Args:
        guard: of this process; `None`: there is no parity, and nothing to do.
        items: those that are wanted.
        newer_than: steps before this one are of no use.
    """
    if guard is None:
        return MadeWhole()
    found, missing = _agreed(guard, items, newer_than)
    for plan in found:
        error = _made(guard, plan)
        failed = consensus.which_processes(error is not None)
        if not failed:
            return MadeWhole(tuple(_told_of(lost) for lost in plan.lost), tuple(missing.items()))
        missing[plan.step] = error or f"process {failed[0]} could not make its part"
    return MadeWhole((), tuple(missing.items()))


def protect_again(guard: Guard | None, items: Iterable[str], step: int, life: int) -> None:
    """Makes parity of what was restored, in the background: who was replaced has none.

    What is of another number of processes keeps the parity that it had.
    """
    for key in (Key(item, step, life) for item in sorted(items)):
        if guard is not None and guard.is_of_as_many(key):
            guard.run(functools.partial(guard.exchange, key))


def _agreed(
    guard: Guard, items: Iterable[str], newer_than: int | None
) -> tuple[list[Plan], dict[int, str]]:
    """Returns the plans of the first process, which looks at what all have."""
    store, process, n = guard.store, jax.process_index(), jax.process_count()
    try:
        told = json.dumps(guard.listing())
    except (KeeperError, OSError) as error:
        told = _NOTHING
        _LOG.warning("What this machine has cannot be told: %s", error)
    if n == 1:  # It may have parity of a job that had more.
        found, missing = plans([json.loads(told)], items, newer_than)
        return found[:_MOST_PLANS], missing
    store.key_value_set(f"{_KEY}/has/{process}", told, allow_overwrite=True)
    # Nobody reads before all have told; and nobody of an earlier restore reads any more.
    consensus.any_process([False])
    if process == 0:
        has = [consensus.value_in_time(store, f"{_KEY}/has/{i}", _TELL_S) for i in range(n)]
        found, missing = plans([json.loads(one or _NOTHING) for one in has], items, newer_than)
        answer = {
            "plans": [
                [plan.step, plan.life, [lost.as_message() for lost in plan.lost]]
                for plan in found[:_MOST_PLANS]
            ],
            "missing": list(missing.items()),
        }
        store.key_value_set(f"{_KEY}/plans", json.dumps(answer), allow_overwrite=True)
    consensus.any_process([False])
    told = consensus.value_in_time(store, f"{_KEY}/plans", _TELL_S) or '{"plans":[],"missing":[]}'
    answer = json.loads(told)
    found = [
        Plan(step, life, tuple(Lost.told(lost) for lost in all_lost))
        for step, life, all_lost in answer["plans"]
    ]
    return found, dict(answer["missing"])


def _made(guard: Guard, plan: Plan) -> str | None:
    """Makes what is this process's part. Returns why not."""
    timeout_s = guard.settings.timeout_s + _ANSWER_S
    try:
        for lost in plan.lost:
            if lost.at == jax.process_index():
                ask = {"do": "mend", "lost": lost.as_message()}
                guard.link().ask(ask, timeout_s=timeout_s)
    except KeeperError as error:
        _LOG.warning("Step %d cannot be made whole here: %s", plan.step, error)
        return str(error)
    return None


def _told_of(lost: Lost) -> Rebuilt:
    sources = tuple(one.process for one in lost.sources if one.process != lost.process)
    return Rebuilt(lost.key.item, lost.key.step, lost.process, lost.n_bytes, sources)
