"""Which coefficients to try next: an evolution of vectors that add up to 1. Pure but for its seed.

The method is LCSC's (Liu et al., "Linear Combination of Saved Checkpoints Makes Consistency and
Diffusion Models Better", arXiv 2404.02241): a population that begins with moving averages of
several rates, tournaments, crossover, Gaussian mutation, and the worst ones dropped. It is plain
NumPy: an evaluation takes seconds to hours and a proposal microseconds, and a search that goes on
where it was interrupted must propose the same again, whatever the release of a library.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lazy_orbax.combine.schedules import merge_coefficients

EMA_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_SIZE, _TOURNAMENT = 20, 3
# A mutation is from a hundredth of an average coefficient to twice that.
_LEAST_STEP, _MOST_STEP = 0.01, 2.0


class Candidate(NamedTuple):
    """Coefficients to try.

    Attributes:
        origin: where they come from: `last`, a schedule, or the numbers of two parents.
        coefficients: one for each checkpoint, which add up to 1.
    """

    origin: str
    coefficients: tuple[float, ...]


class Population:
    """The best candidates so far.

    Invariant: `_members` has at most `_SIZE` candidates by their scores, the lowest first, each
    with its score and its number.
    """

    def __init__(self, n: int, seed: int):
        """Begins with nobody.

        Args:
            n: how many checkpoints there are.
            seed: of the random numbers.
        """
        self._n, self._rng = n, np.random.default_rng(seed)
        self._members: list[tuple[float, int, Candidate]] = []
        self._count = 0

    def next(self) -> Candidate:
        """Returns the next candidate to try, which `add` must be told of."""
        seeds = ["last", "uniform", *(f"ema:{rate}" for rate in EMA_RATES)]
        if self._n == 1 or self._count < len(seeds):
            name = seeds[self._count] if self._count < len(seeds) else "last"
            last = (*(0.0,) * (self._n - 1), 1.0)
            return Candidate(name, last if name == "last" else merge_coefficients(name, self._n))
        first, second = self._parent(), self._parent()
        vectors = [np.array(parent.coefficients) for _, parent in (first, second)]
        child = np.where(self._rng.random(self._n) < 0.5, *vectors)
        steps = np.exp(self._rng.uniform(np.log(_LEAST_STEP), np.log(_MOST_STEP)))
        child = child + self._rng.normal(size=self._n) * steps / self._n
        child[0] = 1 - child[1:].sum()
        return Candidate(f"{first[0]} and {second[0]}", tuple(child.tolist()))

    def _parent(self) -> tuple[int, Candidate]:
        """Returns the best of a few that are drawn by chance."""
        drawn = self._rng.integers(len(self._members), size=_TOURNAMENT)
        _, number, candidate = self._members[drawn.min()]
        return number, candidate

    def add(self, candidate: Candidate, score: float) -> bool:
        """Notes a score. Returns whether it is the best so far.

        Args:
            candidate: what `next` returned.
            score: lower is better; not a number is worst.
        """
        score = float("inf") if np.isnan(score) else score
        is_best = not self._members or score < self._members[0][0]
        self._members.append((score, self._count, candidate))
        self._members.sort(key=lambda member: member[:2])
        del self._members[_SIZE:]
        self._count += 1
        return is_best
