"""The small files of an item: each is read once, and none that is too large."""

import collections
import os

import pytest

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.storage.places import LocalPlace
from lazy_orbax.trust.files import ItemFiles, survey


class Counted(LocalPlace):
    """A directory that counts what is asked of it, and may be as far away as a bucket."""

    asked: collections.Counter
    has_special_files = True

    def size(self, name):
        self.asked["size"] += 1
        return super().size(name)

    def start_read(self, name, *, size, most_bytes):
        self.asked[name] += 1
        return super().start_read(name, size=size, most_bytes=most_bytes)


class FarAway(Counted):
    has_special_files = False


@pytest.fixture(params=[Counted, FarAway])
def place(request, tmp_path):
    for name in ("one", "two", "folder/three", "folder/deeper/four"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    found = request.param(str(tmp_path), 300.0)
    object.__setattr__(found, "asked", collections.Counter())
    return found


@pytest.fixture(params=[True, False], ids=["listed", "not listed"])
def files(request, place):
    return ItemFiles(place, survey(place.directory) if request.param else None)


def test_a_file_is_read_once(files, place):
    files.read_ahead(["one", "two", "nowhere"], 100)
    for _ in range(3):
        assert files.read("one", 100) == b"one" * 10
        files.read_ahead(["one", "folder/three"], 1000)
    assert files.read("folder/three", 1000) == b"folder/three" * 10
    assert files.size("one") == 30
    del place.asked["size"]
    assert place.asked == {"one": 1, "two": 1, "folder/three": 1}


def test_what_was_forgotten_is_read_again(files, place):
    assert files.read("one", 100) == b"one" * 10
    place.kvstore["one"] = b"two" * 10
    assert files.read("one", 100) == b"one" * 10
    assert files.is_begun("one")
    files.forget()
    assert not files.is_begun("one")
    assert files.read("one", 100) == b"two" * 10


def test_what_is_listed_is_not_asked_for(place):
    files = ItemFiles(place, survey(place.directory))
    assert [files.size(name) for name in ("one", "folder/three")] == [30, 120]
    assert files.read("one", 100) == b"one" * 10
    assert place.asked["size"] == 0


def test_what_is_too_large_is_not_read(files, place):
    files.read_ahead(["one"], 29)
    with pytest.raises(MalformedCheckpointError, match="more than 29 bytes"):
        files.read("one", 29)
    assert not place.asked["one"]
    assert files.read("one", 30) == b"one" * 10
    with pytest.raises(MalformedCheckpointError, match="more than 29 bytes"):
        files.read("one", 29)


def test_a_file_that_grew_meanwhile_is_not_read_as_a_whole(place, tmp_path):
    files = ItemFiles(place, survey(place.directory))
    (tmp_path / "one").write_bytes(bytes(10**6))
    with pytest.raises(MalformedCheckpointError, match="more than 30 bytes"):
        files.read("one", 30)


def test_what_is_not_there_is_none(files):
    assert files.read("nowhere", 100) is None
    assert files.size("nowhere") is None
    assert files.names("nowhere") == []


def test_a_folder_has_its_own_files(files):
    assert "folder/three" in files.names("folder")
    assert files.names("folder/deeper") == ["folder/deeper/four"]


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    files = ItemFiles(LocalPlace(str(tmp_path), 300.0), survey(str(tmp_path)))
    with pytest.raises(MalformedCheckpointError, match="a directory"):
        files.read("folder", 100)


def test_a_folder_that_is_there_twice_by_a_link_is_read_by_both_names(tmp_path):
    """Whatever a reader after us finds, we have looked at."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"text")
    (tmp_path / "b").symlink_to("a")
    files = ItemFiles(LocalPlace(str(tmp_path), 300.0), survey(str(tmp_path)))
    assert [files.names(folder) for folder in "ab"] == [["a/file"], ["b/file"]]
    assert [files.read(f"{folder}/file", 100) for folder in "ab"] == [b"text"] * 2


def test_a_pipe_where_nobody_looked_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert ItemFiles(LocalPlace(str(tmp_path), 300.0)).read("pipe", 100) is None
