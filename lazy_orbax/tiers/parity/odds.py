"""How likely is it that a failure takes more than one member of a group?"""

from __future__ import annotations

import math
from typing import Any

from lazy_orbax.errors import OptionError


def parity_survives(*, group: int, machine_mtbf_s: float, exposed_s: float) -> float:
    """Returns the share of failures of machines after which parity makes the newest snapshot again.

    Machines fail at random, independent of each other. A failure is survived if none of the other
    machines of its group fails before all is whole and protected again. It is what
    `TierCost.survives` wants for memory with parity, where all failures are of whole machines; of
    other failures memory survives more.

    Args:
        group: machines of a group, at least 2: `Parity.group`.
        machine_mtbf_s: mean seconds between failures of one machine.
        exposed_s: seconds from a failure until the group is protected again: until the job has
            another machine and has restored, and one exchange (`ProtectionReport.seconds`).

    Raises:
        OptionError: a number is out of range.
    """
    _check("group", group, 2)
    _check("machine_mtbf_s", machine_mtbf_s, 1e-9)
    _check("exposed_s", exposed_s, 0)
    return math.exp(-(group - 1) * exposed_s / machine_mtbf_s)


def _check(name: str, value: Any, least: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least:
        raise OptionError(f"{name}: found {value!r}, wanted a finite number, at least {least:g}.")
