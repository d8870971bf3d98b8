"""Ranges of files into buffers, also where the system gives a part of what was asked for."""

import os

import pytest

from lazy_orbax.restore.source import Bucket, Directory
from lazy_orbax.storage.places import place_of

CONTENT = bytes(range(256)) * 8


def buffers_of(*sizes):
    return [memoryview(bytearray(n)) for n in sizes]


@pytest.fixture(params=["directory", "bucket"])
def source(request, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_bytes(CONTENT)
    if request.param == "directory":
        found = Directory(str(tmp_path))
    else:  # A key-value store of files does what one of objects does.
        found = Bucket(place_of(str(tmp_path)))
    yield found
    found.close()


def test_buffers_are_filled_one_after_the_other(source):
    buffers = buffers_of(3, 0, 500, 1)
    source.read("d/file", 10, buffers)
    assert b"".join(map(bytes, buffers)) == CONTENT[10:514]
    assert (source.requests, source.n_bytes) == (1, 504)


def test_what_is_beyond_the_end_is_an_error(source):
    with pytest.raises(ValueError, match="d/file"):
        source.read("d/file", len(CONTENT) - 3, buffers_of(4))


def test_a_file_that_is_not_there_is_an_error(source):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        source.read("nowhere", 0, buffers_of(1))


@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_reads_go_on(tmp_path, monkeypatch, most):
    (tmp_path / "file").write_bytes(CONTENT)
    preadv = os.preadv

    def short(descriptor, buffers, offset):
        left, some = most, []
        for buffer in buffers:
            some.append(buffer[:left])
            left -= len(some[-1])
        return preadv(descriptor, some, offset)

    monkeypatch.setattr(os, "preadv", short)
    source = Directory(str(tmp_path))
    buffers = buffers_of(10, 20, 300)
    source.read("file", 5, buffers)
    source.close()
    assert b"".join(map(bytes, buffers)) == CONTENT[5:335]


def test_no_file_stays_open(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    before = len(os.listdir("/proc/self/fd"))
    source = Directory(str(tmp_path))
    source.read("file", 0, buffers_of(1))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "file")
    source = Directory(str(tmp_path))
    with pytest.raises(OSError, match="(?i)illegal seek"):
        source.read("file", 0, buffers_of(1))
    source.close()
