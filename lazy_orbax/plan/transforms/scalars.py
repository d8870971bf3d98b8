"""Values of dtypes, and what is raised where a rule does not fit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


class MisfitError(Exception):
    """A rule does not fit a leaf: its name, its shape or its dtype."""


def scalar(value: Any, dtype: Any) -> Any:
    """Returns a value as a scalar of a dtype.

    Raises:
        MisfitError: the dtype has no such value.
    """
    try:
        made = np.asarray(value).astype(dtype)[()]
    except (TypeError, ValueError, OverflowError) as failure:
        raise MisfitError(f"{value!r} is no {dtype}") from failure
    if not is_float(dtype) and made != value:
        raise MisfitError(f"{value!r} is no {dtype}")
    return made


def is_float(dtype: Any) -> bool:
    """Whether a dtype is one of floating-point numbers, real or complex."""
    try:
        ml_dtypes.finfo(dtype)
    except (TypeError, ValueError):
        return False
    return True
