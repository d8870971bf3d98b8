"""How much of each of some checkpoints goes into their merge, in closed form. Pure.

The schedules over a merge window are those of WSM (Tian et al., "WSM: Decay-Free Learning Rate
Schedule via Checkpoint Merging", arXiv 2507.17634). Steps of training add up, so a sum of
checkpoints with coefficients c is a run whose updates between checkpoint j - 1 and j were scaled
by w[j] = c[j] + c[j + 1] + ...: as by a learning rate that decays from 1 to 0. Turned round, a
decay D(x) over the window, sampled at the n checkpoints, gives c[j] = D(j / n) - D((j + 1) / n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lazy_orbax.errors import OptionError

Schedule = str | Sequence[float] | Callable[[int], Sequence[float]]
"""A name such as `cosine`, the coefficients themselves, or a function of their number."""

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
_KNOWN = "uniform, linear, cosine, 1-sqrt, or ema:BETA such as ema:0.9"


def merge_coefficients(schedule: Schedule, n: int) -> tuple[float, ...]:
    """Returns the coefficients of some checkpoints, oldest first.

    | schedule | coefficient of checkpoint j = 0 ... n - 1 |
    |---|---|
    | `uniform` | 1 / n |
    | `linear` | D(x) = 1 - x, which is the uniform one |
    | `cosine` | D(x) = (1 + cos(pi x)) / 2 |
    | `1-sqrt` | D(x) = 1 - sqrt(x) |
    | `ema:BETA` | BETA^(n - 1) for the first, (1 - BETA) BETA^(n - 1 - j) for the others |

    where D stands for D(j / n) - D((j + 1) / n), see the paper (arXiv 2507.17634). `ema` is what an
    exponential moving average holds that began at the first checkpoint and saw the others.

    Args:
        schedule: a name of the table; or the coefficients themselves, which need not add up to 1;
            or a function that is given `n` and returns them.
        n: how many checkpoints there are.

    Raises:
        OptionError: there is no such schedule, or it does not give `n` finite numbers.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise OptionError(f"n={n!r} must be a whole number of checkpoints, at least 1.")
    if isinstance(schedule, str):
        return _named(schedule, n)
    given = schedule(n) if callable(schedule) else schedule
    try:
        found = tuple(map(float, given))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"coefficients={given!r} must be numbers, or a schedule: {_KNOWN}."
        ) from error
    if len(found) != n:
        raise OptionError(f"Found {len(found)} coefficients for {n} sources. Give one for each.")
    if odd := [c for c in found if not math.isfinite(c)]:
        raise OptionError(f"The coefficient {odd[0]} is not finite. Give finite numbers.")
    return found


def _named(schedule: str, n: int) -> tuple[float, ...]:
    name, _, argument = schedule.partition(":")
    if name == "uniform" and not argument:
        return (1 / n,) * n
    if name in _DECAYS and not argument:
        decay = [_DECAYS[name](j / n) for j in range(n)] + [0.0]
        return tuple(decay[j] - decay[j + 1] for j in range(n))
    if name == "ema":
        return _ema(argument, n)
    raise OptionError(f"There is no schedule {schedule!r}. Give {_KNOWN}.")


def _ema(argument: str, n: int) -> tuple[float, ...]:
    try:
        beta = float(argument)
    except ValueError:
        beta = math.nan
    if not 0 <= beta < 1:
        raise OptionError(f"The rate of ema:{argument} must be a number from 0 to below 1.")
    return (beta ** (n - 1), *((1 - beta) * beta ** (n - 1 - j) for j in range(1, n)))
