"""Ranges of files into buffers, also where the system gives a part of what was asked for."""

import os
import queue
import threading
import types

import pytest

from lazy_orbax.restore import source as source_module
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


class Answers:
    """A store that answers when it is told to. It counts the bytes that are asked for."""

    def __init__(self):
        self.told, self.asked = threading.Event(), queue.Queue()

    def read(self, file, byte_range):
        self.asked.put(byte_range.stop - byte_range.start)
        answer = types.SimpleNamespace(state="value", value=bytes(byte_range.stop))
        return types.SimpleNamespace(result=lambda: self.told.wait(30) and answer)


class Changed(threading.Condition):
    """A condition that tells that somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout=None):
        self.waits.set()
        return super().wait(timeout)


def test_a_bucket_is_asked_for_no_more_than_fits_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_MOST_AWAITED_BYTES", 100)
    source, answers = Bucket(place_of(str(tmp_path))), Answers()
    source._store, source._changed = answers, Changed()
    threads = [
        threading.Thread(target=source.read, args=("file", 0, buffers_of(n)), daemon=True)
        for n in (60, 60)
    ]
    for thread in threads:
        thread.start()
    assert answers.asked.get(timeout=30) == 60
    assert source._changed.waits.wait(30)
    with pytest.raises(queue.Empty):
        answers.asked.get_nowait()
    answers.told.set()
    for thread in threads:
        thread.join(30)
    assert answers.asked.get_nowait() == 60
    # What has more alone goes alone.
    source.read("file", 0, buffers_of(1000))
    assert answers.asked.get_nowait() == 1000


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    """A system lets a process open some, such as 1024, and each chunk may be one."""
    opened, open_file, close_file = set(), os.open, os.close

    def noted(path, *how):
        descriptor = open_file(path, *how)
        opened.add(descriptor)
        return descriptor

    def forgotten(descriptor):
        opened.discard(descriptor)
        close_file(descriptor)

    for n in range(100):
        (tmp_path / f"{n}").write_bytes(bytes([n]))
    found = Directory(str(tmp_path))
    monkeypatch.setattr(source_module.os, "open", noted)
    monkeypatch.setattr(source_module.os, "close", forgotten)
    for _ in range(2):
        for n in range(100):
            (buffer,) = buffers_of(1)
            found.read(f"{n}", 0, [buffer])
            assert bytes(buffer) == bytes([n])
            assert len(opened) <= 20
    found.close()
    assert not opened
