"""Which of many cases run by day: enough that each value is met. All the others run at night."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def every(n: int, cases: Iterable[Any]) -> list[Any]:
    """Returns the cases; by day runs each `n`-th of them."""
    return [_case((case,), by_day=i % n == 0) for i, case in enumerate(cases)]


def rotated(cases: Iterable[Any], ways: Sequence[Any]) -> list[Any]:
    """Returns each case in each way, flat; by day runs each case in one way, in turn."""
    return [
        _case((*_flat(case), *_flat(way)), by_day=i % len(ways) == j)
        for i, case in enumerate(cases)
        for j, way in enumerate(ways)
    ]


def _flat(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _case(values: tuple[Any, ...], *, by_day: bool) -> Any:
    return pytest.param(*values, marks=() if by_day else pytest.mark.slow)
