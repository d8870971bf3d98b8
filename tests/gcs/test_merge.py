"""Merges of checkpoints on `gs://`, to a directory and to a bucket."""

from __future__ import annotations

import pytest

ZARR3 = {"use_ocdbt": False, "use_zarr3": True}


@pytest.mark.parametrize("form", [{}, pytest.param(ZARR3, marks=pytest.mark.slow)])
def test_a_merge_in_a_bucket_is_a_step_there(start, root, form, tmp_path):
    job = start()
    job.do("open", root, **form)
    job.do("save", 1)
    job.do("save", 2)
    sources = [f"{root}/1", f"{root}/2/default"]
    assert job.do("merge", str(tmp_path / "3"), *sources) == []
    assert job.do("merge", f"{root}/3", *sources) == []
    assert start().do("open", root, stock=True) == [1, 2, 3]
