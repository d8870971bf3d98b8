"""Parity of a group: each member keeps the XOR of one stripe of every other member's snapshot.

The snapshot of each of n members is cut into n - 1 stripes, one for each other member, and padded
with zeros. Which stripe goes to whom rotates as in RAID-5 (Patterson, Gibson and Katz, 1988), so
that each member sends its snapshot once and keeps 1/(n - 1) of one. With two members the stripe is
the snapshot: a copy. REFT (arXiv:2310.12670) has the same between nodes. No bytes are moved here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

# Whole words for the XOR, and whole lines of the cache.
_ALIGNMENT = 64
_WORD_BYTES = 8

Part = bytes | memoryview | np.ndarray
Parts = Iterable[tuple[int, Part]]
"""Bytes that come in parts: where each begins, and the part."""


def stripe_bytes(n_bytes: int, n: int) -> int:
    """Returns the bytes of a stripe of a snapshot of so many, padded, in a group of `n`."""
    return -(-n_bytes // ((n - 1) * _ALIGNMENT)) * _ALIGNMENT


def stripe_of(n_bytes: int, n: int, owner: int, holder: int) -> tuple[int, int]:
    """Returns where the stripe that one member has of another begins and ends, unpadded.

    Args:
        n_bytes: of the owner's snapshot.
        n: members of the group.
        owner: whose snapshot it is a part of: its place in the group.
        holder: who has it in its parity.
    """
    each = stripe_bytes(n_bytes, n)
    first = (holder - owner - 1) % n * each
    return min(first, n_bytes), min(first + each, n_bytes)


def others(n: int, *without: int) -> Iterator[int]:
    """Yields the places of a group but some, those after the first of them at first.

    Each member begins with another one, so that not all ask the same.
    """
    first = without[0] if without else 0
    return (place for i in range(n) if (place := (first + i) % n) not in without)


def add(target: np.ndarray, at: int, part: Part) -> None:
    """XORs bytes into others. What does not fit is padding, and left out.

    Args:
        target: bytes.
        at: where in them.
        part: the bytes to add.
    """
    mine = target[at : at + len(part)]
    added = np.frombuffer(part, np.uint8)[: mine.size]
    whole = mine.size // _WORD_BYTES * _WORD_BYTES
    for one, other in (
        (mine[:whole].view(np.uint64), added[:whole].view(np.uint64)),
        (mine[whole:], added[whole:]),
    ):
        np.bitwise_xor(one, other, out=one)


def parity_bytes(sizes: Sequence[int], holder: int) -> int:
    """Returns the bytes of a member's parity: of the longest stripe in it.

    Args:
        sizes: of the snapshot of each member.
        holder: the member.
    """
    n = len(sizes)
    return max(stripe_bytes(sizes[owner], n) for owner in others(n, holder))


def make_parity(
    target: np.ndarray, sizes: Sequence[int], holder: int, pull: Callable[[int], Parts]
) -> None:
    """Makes the parity of a member.

    Args:
        target: where: as many bytes as it has.
        sizes: of the snapshot of each member.
        holder: the member.
        pull: returns the stripe that a member has for this one.
    """
    first, *more = others(len(sizes), holder)
    end = 0
    for at, part in pull(first):  # What was there before is not read.
        end = min(at + len(part), target.size)
        target[at:end] = np.frombuffer(part, np.uint8)[: end - at]
    target[end:] = 0
    for owner in more:
        for at, part in pull(owner):
            add(target, at, part)


def rebuild(
    target: np.ndarray,
    sizes: Sequence[int],
    lost: int,
    pull_parity: Callable[[int], Parts],
    pull_stripe: Callable[[int, int], Parts],
) -> None:
    """Makes a lost snapshot again: each stripe is the parity without the stripes of the others.

    Args:
        target: where: as many bytes as the snapshot had.
        sizes: of the snapshot of each member.
        lost: whose it is.
        pull_parity: returns the parity of a member.
        pull_stripe: returns the stripe of one member that is in the parity of another.
    """
    n = len(sizes)
    target[:] = 0
    for holder in others(n, lost):
        first, end = stripe_of(sizes[lost], n, lost, holder)
        sources = [pull_parity(holder)]
        sources += [pull_stripe(owner, holder) for owner in others(n, holder, lost)]
        for source in sources:
            for at, part in source:
                add(target[first:end], at, part)
