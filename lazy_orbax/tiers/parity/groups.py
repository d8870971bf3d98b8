"""Who keeps parity of whom: groups of processes, no two of which fail together."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from lazy_orbax.errors import KeeperError


def groups_of(domains: Sequence[str], wanted: int) -> list[tuple[int, ...]]:
    """Returns the groups, each with its processes in order.

    Processes stand in a row, those of one domain side by side, and are dealt out to the groups in
    turn: a domain with no more processes than there are groups has at most one in each.

    Args:
        domains: of each process, what fails as a whole: its host, rack or slice.
        wanted: members of a group. A group has more where the processes do not divide, and fewer
            where there are few domains.

    Raises:
        KeeperError: no process can be in a group with one of another domain.
    """
    sizes = collections.Counter(domains)
    n_groups = max(len(domains) // wanted, 1, *sizes.values())
    if len(domains) < 2 * n_groups:
        name, most = sizes.most_common(1)[0]
        raise KeeperError(
            f"parity needs for each process another one in another failure domain: {name!r} has "
            f"{most} of {len(domains)} processes. Run on more hosts, or say what fails "
            "together by `Parity(domain=...)`"
        )
    row = sorted(range(len(domains)), key=lambda process: (domains[process], process))
    return [tuple(sorted(row[i::n_groups])) for i in range(n_groups)]


def group_with(groups: Sequence[tuple[int, ...]], process: int) -> tuple[int, ...]:
    """Returns the group of a process."""
    return next(group for group in groups if process in group)
