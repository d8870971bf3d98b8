"""What a storage can do: measured, told of, and nothing left behind."""

from __future__ import annotations

import pytest

from lazy_orbax.errors import OptionError
from lazy_orbax.inspection import bench as module
from lazy_orbax.inspection.bench import bench


def test_speeds_are_measured_and_nothing_is_left(tmp_path):
    told = []
    found = bench(tmp_path, n_bytes=2 * module.PART_BYTES, on_progress=lambda *n: told.append(n))
    assert found.n_bytes == 2 * module.PART_BYTES
    assert min(found.write_bytes_per_s, found.read_bytes_per_s, found.small_writes_per_s) > 0
    assert [done for done, _ in told] == [n * module.PART_BYTES for n in (1, 2, 3, 4)]
    assert told[-1][0] == told[-1][1]
    assert list(tmp_path.iterdir()) == []
    assert "durable writes" in str(found)


def test_nothing_is_left_where_it_fails(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no reads")

    monkeypatch.setattr(module, "_forget", refuse)
    with pytest.raises(OSError, match="no reads"):
        bench(tmp_path, n_bytes=module.PART_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_is_refused(tmp_path):
    for path, keywords in (
        (tmp_path / "nothing", {}),
        (7, {}),
        (tmp_path, {"n_bytes": 1}),
        (tmp_path, {"n_bytes": 1e9}),
    ):
        with pytest.raises(OptionError):
            bench(path, **keywords)
