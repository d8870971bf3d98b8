"""What is saved to `gs://` is committed there, and stock Orbax restores it bit for bit."""

from __future__ import annotations

import pytest

FORMATS = {
    "ocdbt": {},
    "ocdbt-zarr3": {"use_zarr3": True},
    "zarr": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_restored_by_stock_and_by_ours(start, root, form):
    job = start()
    assert job.do("open", root, **FORMATS[form]) == []
    job.do("save", 1)
    job.do("save", 2)
    assert job.do("steps") == [1, 2]
    assert job.do("in_flight_bytes") == 0
    assert job.do("wrong", 1, 2) == []
    assert start().do("open", root, stock=True) == [1, 2]
    assert job.do("open", root, stock=True) == [1, 2]
    assert job.do("wrong", 1, 2) == []


def test_saves_of_states_that_are_donated_at_once(start, root):
    job = start()
    job.do("open", root)
    assert job.do("train", 5) == []
    assert job.do("steps") == list(range(5))
    assert job.do("in_flight_bytes") == 0


@pytest.mark.parametrize(
    ("form", "name", "content"),
    [
        ("ocdbt", "_METADATA", b"{}"),
        ("ocdbt", "manifest.ocdbt", b"\x0c\xdb" * 40),
        ("zarr", "w/.zarray", b'{"zarr_format": 2, "shape": [4], "chunks": [1099511627776]}'),
    ],
    ids=["tree", "manifest", "array"],
)
def test_what_is_malformed_is_refused(start, root, form, name, content):
    job = start()
    job.do("open", root, **FORMATS[form])
    job.do("save", 1)
    job.do("spoil", 1, f"default/{name}", content)
    outcome = job.attempt("wrong", 1)
    # It has digests, so it was a good one once; what is malformed is seen before they are asked.
    assert outcome.error == "CorruptCheckpointError", outcome.trace
    assert "MalformedCheckpointError" in outcome.trace
    assert f"{root}/1/default" in outcome.message
    assert name in outcome.message


def test_a_step_that_was_rolled_back_in_the_bucket_is_refused(start, root):
    job = start()
    job.do("open", root)
    for step in (1, 2):
        job.do("save", step)
    job.do("roll_back", 2, 1)
    assert job.do("wrong", 1) == []
    outcome = job.attempt("wrong", 2)
    assert outcome.error == "CorruptCheckpointError", outcome.trace
    assert "saved at step 1" in outcome.message
    assert f"{root}/2/default" in outcome.message
