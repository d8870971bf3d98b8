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


def test_twenty_saves_of_states_that_are_donated_at_once(start, root):
    job = start()
    job.do("open", root)
    assert job.do("train", 20) == []
    assert job.do("steps") == list(range(20))
    assert job.do("in_flight_bytes") == 0


def test_two_processes_with_one_checkpoint(start, free_port, proxy, root):
    """Each writes its own part, in `ocdbt.process_N`; the first merges."""
    jobs = [start(), start()]
    address = f"127.0.0.1:{free_port()}"

    def both(command, *args):
        for job in jobs:
            job.begin(command, *args)
        outcomes = [job.end() for job in jobs]
        assert not any(outcome.error for outcome in outcomes), outcomes
        return [outcome.result for outcome in outcomes]

    for i, job in enumerate(jobs):
        job.begin("join", address, 2, i)
    assert [job.end().result for job in jobs] == [2, 2]
    both("open", root)
    steps = list(range(1, 21))
    both("save_and_donate", steps)
    assert both("steps") == [steps, steps]
    assert both("in_flight_bytes") == [0, 0]
    both("close")  # The other process is told of the end only by this, or by its next save.
    written = both("bytes_written")
    witness = start()
    assert witness.do("open", root, stock=True) == steps
    assert witness.do("wrong", *steps) == []
    assert {sum(two) for two in zip(*written, strict=True)} == {witness.do("state_bytes")}
    for i in range(2):
        assert any(f"20/default/ocdbt.process_{i}/d/" in line for line in proxy.lines)
