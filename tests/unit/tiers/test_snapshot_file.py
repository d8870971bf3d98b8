"""A file of a snapshot is whole, or is seen not to be, whatever of it was written."""

import fcntl
import json
import os

import numpy as np
import pytest

from lazy_orbax.tiers.snapshot_file import (
    PAGE_BYTES,
    SnapshotError,
    SnapshotFile,
    read_memory,
    read_snapshot,
)

WHOSE = {"run": "run", "item": "default", "step": 3, "life": 1, "process": 0}
LAYOUT, FACTS = b'{"pieces":[]}', json.dumps(WHOSE).encode()
N_BYTES = 3 * PAGE_BYTES
SEAL_BYTES = 72


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return str(path)


def sealed(path, serial=1):
    file = SnapshotFile(path, N_BYTES)
    file.break_seal()
    file.memory[PAGE_BYTES : PAGE_BYTES + 4] = 7
    file.seal(serial, LAYOUT, FACTS, end=PAGE_BYTES + 4)
    return file


def test_what_was_sealed_is_read(path):
    sealed(path, serial=5).close()
    found = read_snapshot(path)
    assert (found.serial, found.step, found.layout) == (5, 3, {"pieces": []})
    assert read_memory(path)[PAGE_BYTES : PAGE_BYTES + 4].tolist() == [7] * 4


def test_what_is_mapped_at_once_is_the_same_file_and_whoever_reads_it_cannot_write(path):
    file = SnapshotFile(path, N_BYTES, is_mapped_now=True)
    found = read_memory(path, is_mapped_now=True)
    file.memory[PAGE_BYTES : PAGE_BYTES + 4] = 9
    assert found[PAGE_BYTES : PAGE_BYTES + 4].tolist() == [9] * 4
    assert not found.flags.writeable
    assert file.memory.flags.writeable


def test_each_byte_that_is_written_has_memory_behind_it(path):
    SnapshotFile(path, N_BYTES).close()
    assert os.stat(path).st_blocks * 512 >= N_BYTES


def test_a_file_that_was_never_sealed_holds_nothing(path):
    SnapshotFile(path, N_BYTES).close()
    with pytest.raises(SnapshotError, match="never sealed"):
        read_snapshot(path)


def test_a_broken_seal_is_seen_though_all_else_is_there(path):
    file = sealed(path)
    file.break_seal()
    with pytest.raises(SnapshotError, match="never sealed"):
        read_snapshot(path)


def test_a_writer_that_dies_before_the_last_word_leaves_nothing_whole(path):
    """Whatever prefix of the bytes of the seal came to be."""
    file = sealed(path)
    whole = file.memory[:SEAL_BYTES].copy()
    for n in range(SEAL_BYTES):
        file.memory[:SEAL_BYTES] = 0
        file.memory[:n] = whole[:n]
        with pytest.raises(SnapshotError):
            read_snapshot(path)


@pytest.mark.parametrize("where", ["seal", "texts"])
def test_a_flipped_bit_is_seen(path, where):
    file = sealed(path)
    first = 0 if where == "seal" else PAGE_BYTES + 4
    n_bytes = SEAL_BYTES if where == "seal" else len(LAYOUT) + len(FACTS)
    for i in range(first, first + n_bytes):
        file.memory[i] ^= 1
        with pytest.raises(SnapshotError):
            read_snapshot(path)
        file.memory[i] ^= 1
    assert read_snapshot(path).serial == 1


@pytest.mark.parametrize("text", [b"[1]", b"[" * 10**5, b"nonsense"])
def test_a_text_that_is_no_object_is_refused(path, text):
    file = SnapshotFile(path, N_BYTES + len(text))
    file.seal(1, text, FACTS, end=PAGE_BYTES)
    with pytest.raises(SnapshotError, match="layout"):
        read_snapshot(path)


@pytest.mark.parametrize("name", WHOSE)
def test_facts_that_do_not_say_whose_they_are_are_refused(path, name):
    file = SnapshotFile(path, N_BYTES)
    for facts in ({**WHOSE, name: None}, {n: v for n, v in WHOSE.items() if n != name}):
        file.seal(1, LAYOUT, json.dumps(facts).encode(), end=PAGE_BYTES)
        with pytest.raises(SnapshotError, match=f"no {name}"):
            read_snapshot(path)


def test_a_file_that_was_cut_is_refused(path):
    sealed(path).close()
    os.truncate(path, PAGE_BYTES + 1)
    with pytest.raises(SnapshotError):
        read_snapshot(path)
    os.truncate(path, 10)
    with pytest.raises(SnapshotError, match="shorter"):
        read_snapshot(path)


def test_a_link_is_not_followed(path, tmp_path):
    sealed(path).close()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        read_snapshot(str(tmp_path / "link"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="not a file of user"):
        read_snapshot(str(tmp_path / "pipe"))


def test_the_file_of_another_user_is_refused(path, monkeypatch):
    sealed(path).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(path).st_uid + 1)
    with pytest.raises(SnapshotError, match="not a file of user"):
        read_snapshot(path)
    with pytest.raises(SnapshotError, match="not a file of user"):
        SnapshotFile(path, N_BYTES)


def test_memory_that_is_looked_at_may_be_let_go_of(path):
    file = sealed(path)
    view = file.memory[:10]
    file.close()
    assert view.size == 10
    assert np.array_equal(read_memory(path)[:10], view)


def test_a_child_that_is_forked_meanwhile_stops_no_later_snapshot(path, monkeypatch):
    """It has a copy of the descriptor that is locked, for as long as it lives."""
    flock, copies = fcntl.flock, []

    def fork(descriptor, how):
        flock(descriptor, how)
        if how != fcntl.LOCK_UN:
            copies.append(os.dup(descriptor))

    file = sealed(path)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fork)
        file.break_seal()
    file.break_seal()
    file.close()
    os.close(*copies)
