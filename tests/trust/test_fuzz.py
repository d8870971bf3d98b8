"""Some hundred malformed checkpoints; `fuzz.py` makes and restores as many as one likes."""

from __future__ import annotations

import pathlib
import tempfile

import pytest
from trust import fuzz

# Of these all is compared with digests.
_OURS = ("ours", "plain zarr3")


def found(record_property, title, numbers, what="restore"):
    """Returns how some cases ended, none of them badly."""
    in_memory = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as scratch:
        cases = list(fuzz.cases(0, numbers, pathlib.Path(scratch), what))
    for row in fuzz.table(cases):
        record_property("table row", [title, *row])
    assert [case for case in cases if fuzz.is_bad(case)] == []
    assert len(cases) == len(numbers)
    # Most are noticed, and some are harmless.
    ended = [how for case in cases for how in case.ended]
    assert ended.count("refused") > len(cases)
    assert "same" in ended
    return cases


@pytest.mark.parametrize(
    ("first", "n_cases"), [(0, 100), pytest.param(100, 1000, marks=pytest.mark.slow)]
)
def test_malformed_checkpoints_are_refused_clearly(record_property, first, n_cases):
    title = "Restores of malformed checkpoints"
    cases = found(record_property, title, range(first, first + n_cases))
    assert {case.kind for case in cases} == set(fuzz.MUTATIONS)


@pytest.mark.parametrize(
    ("first", "n_cases"), [(20, 30), pytest.param(50, 1000, marks=pytest.mark.slow)]
)
def test_nothing_else_is_made_of_malformed_checkpoints(record_property, first, n_cases):
    """They are merged, searched and exported. What has digests never becomes something else."""
    title = "Merges, searches and exports of malformed checkpoints"
    cases = found(record_property, title, range(first, first + n_cases), "combine")
    ours = [case for case in cases if case.what.startswith(_OURS)]
    assert ours
    assert [case for case in ours if "different" in case.ended] == []
    assert not any(how in case.ended for case in cases for how in ("named", "noted"))
