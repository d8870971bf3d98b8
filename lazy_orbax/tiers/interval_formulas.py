"""Formulas for the best interval between saves, where failures come at random.

That of J. W. Young, "A first order approximation to the optimum checkpoint interval" (1974), and
the one that refines it, of J. T. Daly, "A higher order estimate of the optimum checkpoint interval
for restart dumps" (2006).
"""

from __future__ import annotations

import math


def young_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Returns Young's interval: seconds of training between two saves.

    Args:
        cost_s: seconds of a save.
        mtbf_s: mean seconds between failures.
    """
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Returns Daly's interval: seconds of training between two saves.

    Args:
        cost_s: seconds of a save.
        mtbf_s: mean seconds between failures.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return young_interval_s(cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s
