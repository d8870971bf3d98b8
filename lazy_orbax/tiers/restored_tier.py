"""What a restore takes from a tier: which steps there are, and the items of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lazy_orbax.errors import RestoreError, summarize
from lazy_orbax.restore.like import likeness_of
from lazy_orbax.restore.load import load
from lazy_orbax.restore.opened import opened
from lazy_orbax.tiers.kept_tree import NotAtHandError
from lazy_orbax.tiers.promoted_steps import listed, run_of

MOST_STEPS = 16
"""Of each tier the newest steps are tried, and no more."""


def steps_in_tier(tier: str) -> list[int]:
    """Returns the newest steps that a tier lists, the newest one first."""
    return sorted((step for step, _ in listed(tier)), reverse=True)[:MOST_STEPS]


def from_tier(
    tier: str, step: int, run: str, targets: Mapping[str, Any]
) -> tuple[dict[str, Any], Exception | None]:
    """Restores all items of a step in a tier, or says why not. Each byte is compared first.

    Args:
        tier: the tier.
        step: the step.
        run: the run. What was brought there from another is none of its own.
        targets: Orbax's arguments, for each item. Without a target, arrays are NumPy arrays.
    """
    try:
        found = dict(listed(tier))
        if step not in found:
            raise NotAtHandError(f"this process does not find step {step} in {tier}")
        if (other := run_of(found[step])) not in (None, run):
            raise NotAtHandError(f"it is of the run {other!r}; give each run tiers of its own")
        values = {}
        for item, args in targets.items():
            refuse_more_than_a_target(item, args)
            path, like = str(found[step] / item), getattr(args, "item", None)
            values[item] = load(path, like)
            if like is not None and not getattr(args, "partial_restore", False):
                _refuse_part(path, like)
        return values, None
    except Exception as error:  # noqa: BLE001 - All processes hear of it before it is raised.
        return {}, error


def _refuse_part(path: str, like: Any) -> None:
    """Refuses a target without arrays that the item has, as memory and storage do.

    Raises:
        RestoreError: there are such arrays.
    """
    formats = opened(path, False).formats
    named = {leaf.name for leaf in likeness_of(like, formats, None, None).wanted}
    if extra := sorted(set(formats) - named):
        listed_ones = summarize([f"leaf {name}: found it, wanted no such leaf" for name in extra])
        raise RestoreError(f"What is wanted does not fit {path}:{listed_ones}")


def refuse_more_than_a_target(item: str, args: Any) -> None:
    """Leaves to storage what Orbax alone knows how to do.

    Raises:
        NotAtHandError: the arguments say more of the leaves than a target does.
    """
    for name in ("restore_args", "transforms"):
        if getattr(args, name, None):
            raise NotAtHandError(
                f"the item {item} is wanted with `{name}`, which memory and tiers do not follow; "
                "give shapes, dtypes and shardings as the target, `item`"
            )
