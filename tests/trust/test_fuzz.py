"""Some hundred malformed checkpoints; `fuzz.py` makes and restores as many as one likes."""

from __future__ import annotations

import pathlib
import tempfile

import pytest
from trust import fuzz


@pytest.mark.parametrize(
    ("first", "n_cases"), [(0, 100), pytest.param(100, 1000, marks=pytest.mark.slow)]
)
def test_malformed_checkpoints_are_refused_clearly(record_property, first, n_cases):
    in_memory = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as scratch:
        found = list(fuzz.cases(0, range(first, first + n_cases), pathlib.Path(scratch)))
    for row in fuzz.table(found):
        record_property("table row", ["Restores of malformed checkpoints", *row])
    assert [case for case in found if fuzz.is_bad(case)] == []
    assert len(found) == n_cases
    assert {case.kind for case in found} == set(fuzz.MUTATIONS)
    # Most are noticed, and some are harmless.
    ended = [how for case in found for how in case.ended]
    assert ended.count("refused") > n_cases
    assert "same" in ended
