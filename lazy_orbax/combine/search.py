"""`search`: the linear combination of checkpoints that evaluates best, by evolution."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from lazy_orbax.combine.merge_sources import digest_of_digests, matched, wanted_of
from lazy_orbax.combine.search_log import SearchLog
from lazy_orbax.combine.search_population import Candidate, Population
from lazy_orbax.combine.search_states import combiner, keeps_differences
from lazy_orbax.errors import OptionError
from lazy_orbax.restore.load import load
from lazy_orbax.restore.opened import item_at, opened
from lazy_orbax.restore.transformed import Checkpoint
from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.viewed import Viewed

_log = logging.getLogger("lazy_orbax")
_FORMAT = 1
_COLUMNS = (Column("candidate"), Column("score", is_number=True))


@dataclasses.dataclass(frozen=True)
class Searched(Viewed):
    """What `search` found.

    Attributes:
        coefficients: the best ones, for `merge`.
        score: theirs.
        last: the score of the last checkpoint.
        best_ema: the lowest score of the moving averages that the search began with; infinite
            where none was evaluated.
        n_evaluated: how many candidates have a score, those of earlier runs included.
        kept_differences: whether differences were kept on the devices, and not streamed.
    """

    coefficients: tuple[float, ...]
    score: float
    last: float
    best_ema: float
    n_evaluated: int
    kept_differences: bool

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        named = (
            ("searched", self.score),
            ("last checkpoint", self.last),
            ("best moving average", self.best_ema),
        )
        rows = tuple((name, f"{score:.6g}") for name, score in named)
        numbers = ", ".join(f"{c:.4g}" for c in self.coefficients)
        return (Table(_COLUMNS, rows), Lines((f"coefficients, oldest first: {numbers}",)))


def search(  # noqa: PLR0913 - Keywords, of which most calls give none.
    evaluate: Callable[[Any], float],
    sources: Sequence[Any],
    budget: int,
    *,
    like: Any = None,
    seed: int = 0,
    log: Any = None,
    keep: bool | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Searched:
    """Searches the linear combination of checkpoints with the lowest score.

    The method is LCSC's (arXiv 2404.02241): an evolution of coefficients that add up to 1. It tries
    the last checkpoint, the mean and moving averages of six rates first; measure on held-out data.
    The proposals depend on the seed and the scores alone.

    Args:
        evaluate: is given a tree as `load` returns it, with JAX arrays where floats are, and
            returns a score. Lower is better; NaN is worst. What it raises ends the search.
        sources: the checkpoints, oldest first: see `merge`.
        budget: how many candidates are evaluated in all.
        like: the tree to load of each: see `load`. Its shardings say where arrays are.
        seed: of the random numbers.
        log: a file with one JSON value a line for each candidate. If it is there, the search goes
            on after the last one in it, and evaluates none again.
        keep: whether to keep the differences of all checkpoints on the devices. Otherwise all are
            read again for each candidate. `None` keeps them if they take less than half of the
            memory that is free.
        on_progress: is called with the number of candidates that have a score, and the budget.

    Returns:
        The best coefficients, to `merge` the sources with.

    Raises:
        OptionError: an argument is out of range, or `log` is of another search.
        MergeError: the sources do not fit each other.
        CorruptCheckpointError: a source is not what was saved.
        MalformedCheckpointError: a source is not a checkpoint that Orbax wrote.
    """
    items = _items_of(evaluate, sources, budget)
    n = len(items)
    found = [opened(item, verify=False) for item in items]
    leaves = matched(found, wanted_of(None, "float32", n - 1, n))
    kept = keeps_differences(leaves, n) if keep is None else keep
    known = SearchLog(log, _header(seed, items, found))
    combine = combiner(lambda i: load(items[i], like), n, keeps=kept)
    population, tried = Population(n, seed), list[tuple[float, Candidate]]()
    for number in range(budget):
        candidate = population.next()
        score = known.known(number, candidate)
        if score is None:
            score = float(evaluate(combine(candidate.coefficients)))
            known.add(number, candidate, score)
        if population.add(candidate, score):
            _log.info("Candidate %d (%s) scores %g.", number, candidate.origin, score)
        tried.append((math.inf if math.isnan(score) else score, candidate))
        if on_progress:
            on_progress(number + 1, budget)
    return _searched(tried, kept)


def _header(seed: int, items: list[str], found: Sequence[Checkpoint]) -> dict[str, Any]:
    """Returns what a log begins with: what is the same where a search goes on."""
    digests = [digest_of_digests(source) for source in found]
    return {"lazy_orbax_search": _FORMAT, "seed": seed, "sources": items, "digests": digests}


def _searched(tried: Sequence[tuple[float, Candidate]], kept: bool) -> Searched:
    score, best = min(tried, key=lambda one: one[0])
    emas = [score for score, one in tried if one.origin.startswith("ema:")]
    best_ema = min(emas, default=math.inf)
    return Searched(best.coefficients, score, tried[0][0], best_ema, len(tried), kept)


def _items_of(evaluate: Any, sources: Sequence[Any], budget: Any) -> list[str]:
    """Checks arguments of `search`. Returns the items that are searched.

    Raises:
        OptionError: one is out of range.
    """
    if not callable(evaluate):
        raise OptionError(f"evaluate={evaluate!r} is not callable.")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise OptionError(f"budget={budget!r} must be a whole number of candidates, at least 1.")
    items = [item_at(path) for path in sources]
    if not items:
        raise OptionError("There are no sources. Give a list of the paths of checkpoints.")
    return items
