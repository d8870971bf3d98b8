"""The directory of the keeper: this user's alone, with a limit, and nothing is left of it."""

import os

import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.shelf import Full, Shelf, file_of

FILES = [file_of("run", "default", 0, generation) for generation in (0, 1)]


def test_nobody_else_may_enter(place):
    shelf = Shelf(place)
    assert os.stat(shelf.path).st_mode & 0o777 == 0o700
    shelf.make_room(FILES[0], 2**20, 2**30)
    assert os.stat(shelf.path_of(FILES[0])).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_directory_that_others_may_enter_is_refused(place, mode):
    os.mkdir(place)
    os.chmod(place, mode)
    with pytest.raises(KeeperError, match="wanted user"):
        Shelf(place)


def test_the_directory_of_another_user_is_refused(place, monkeypatch):
    os.mkdir(place, 0o700)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(KeeperError, match=f"wanted user {other}"):
        Shelf(place)


def test_a_link_to_a_directory_is_refused(place, tmp_path):
    os.symlink(tmp_path, place)
    with pytest.raises(KeeperError, match="no directory"):
        Shelf(place)


def test_a_directory_that_cannot_be_made_is_named(place):
    with pytest.raises(KeeperError, match="cannot be made"):
        Shelf(f"{place}/no/such")


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made():
    with pytest.raises(KeeperError, match="at most 100"):
        Shelf("/dev/shm/" + "x" * 200)


def test_one_keeper_has_the_lock(place):
    shelf = Shelf(place)
    lock = shelf.lock()
    assert lock is not None
    assert shelf.is_served
    assert Shelf(place).lock() is None
    os.close(lock)
    assert not shelf.is_served


def test_the_limit_counts_all_files_and_a_longer_one_once(place):
    shelf = Shelf(place)
    shelf.make_room(FILES[0], 2**20, 2**21)
    shelf.make_room(FILES[1], 2**20, 2**21)
    shelf.make_room(FILES[1], 2**20, 2**21)  # It is that long already.
    with pytest.raises(Full, match=f"beside the {2**20} bytes that are kept: the keeper's limit"):
        shelf.make_room(FILES[1], 2**20 + 1, 2**21)
    assert shelf.used_bytes() == 2**21


@pytest.mark.parametrize("before", [0, 2**20])
def test_a_full_file_system_says_what_to_do_and_loses_nothing(place, before):
    shelf = Shelf(place)
    if before:
        shelf.make_room(FILES[0], before, 2**60)
    with pytest.raises(Full, match="--shm-size"):
        shelf.make_room(FILES[0], 2**50, 2**60)  # No machine has that.
    assert shelf.used_bytes() == before


@pytest.mark.parametrize("file", ["../x", "lock", "", None, FILES[0] + "/", "x" * 32 + ".0.slabs"])
def test_only_a_name_of_a_snapshot_is_one(place, file):
    shelf = Shelf(place)
    with pytest.raises(KeeperError, match="not the name"):
        shelf.make_room(file, 1, 2**30)


def test_names_differ_where_anything_does():
    whose = [("run", "default", 0), ("run", "default", 1), ("run", "other", 0), ("r", "default", 0)]
    assert len({file_of(*each, g) for each in whose for g in (0, 1)}) == 8


def test_nothing_is_left_at_the_end_but_what_is_not_ours(place):
    shelf = Shelf(place)
    os.close(shelf.lock())
    shelf.make_room(FILES[0], 2**20, 2**30)
    shelf.remove_all()
    assert not os.path.exists(place)
    shelf = Shelf(place)
    with open(f"{place}/of_the_user", "w"):
        pass
    shelf.remove_all()
    assert os.listdir(place) == ["of_the_user"]


def test_what_a_killed_keeper_left_goes_with_the_last_snapshot(place):
    shelf, file = Shelf(place), file_of("run", "default", 0, 0)
    for path in (shelf.socket, shelf.log):
        open(path, "w").close()
    shelf.make_room(file, 4096, 2**20)
    shelf.tidy()
    assert os.path.exists(shelf.socket)
    shelf.remove(file)
    lock = shelf.lock()
    shelf.tidy()  # There is a keeper.
    assert os.path.exists(shelf.socket)
    os.close(lock)
    shelf.tidy()
    assert not os.path.exists(place)
