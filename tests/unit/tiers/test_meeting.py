"""What is told in one call is heard in that one alone, and nothing stays of it."""

import json
import os
import time

import pytest

from lazy_orbax._paths import MEETING
from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.meeting import Meeting, awaited


def called(token, *lives, called_s=0.0):
    return {"token": token, "lives": lives, "called_s": called_s}


def test_what_is_told_in_a_call_is_heard_by_all(tmp_path):
    leader, other = Meeting(str(tmp_path)), Meeting(str(tmp_path))
    assert other.token() is None
    with leader.called({1}) as token:
        assert other.token() == token
        for part in (2, 10):
            other.tell(token, f"here-{part}", {"processes": [part]})
        other.tell(token, "hereby-3", {"processes": []})
        assert leader.told_by_all(token, "here") == {2: {"processes": [2]}, 10: {"processes": [10]}}
        assert leader.told(token, "step") is None
    assert other.token() is None
    assert os.listdir(tmp_path) == []


def test_a_call_ends_the_one_of_a_leader_that_was_killed(tmp_path):
    meeting = Meeting(str(tmp_path))
    killed = meeting.called({1})
    first = killed.__enter__()
    meeting.tell(first, "here-1", {"processes": [1]})
    with meeting.called({1}) as second:
        assert second != first
        assert meeting.told_by_all(first, "here") == meeting.told_by_all(second, "here") == {}
        killed.__exit__(None, None, None)  # It lives, and is late: it ends nothing but its own.
        assert meeting.token() == second


def test_a_call_is_heard_by_those_whom_it_means(tmp_path):
    meeting = Meeting(str(tmp_path))
    with meeting.called({1, 2**61}) as token:
        for lives in (None, {1}, {3, 2**61}):
            assert meeting.token(lives) == token
        for lives in ({3}, set()):
            assert meeting.token(lives) is None


def test_a_later_life_of_the_job_goes_first(tmp_path):
    """On a machine that the job has left, a leader still has its last step."""
    late, later = Meeting(str(tmp_path)), Meeting(str(tmp_path))
    with late.called({1, 4}) as first:
        assert late.token() == first
        with later.called({5, 3}) as token:
            with pytest.raises(KeeperError, match="a later life of the job"):
                late.called({4}).__enter__()
            assert not late.clear([4])
            assert not late.clear([])
            assert later.token() == token
    assert os.listdir(tmp_path) == []
    with later.called({5}):
        assert later.clear([5])
        assert later.token() is None
        with late.called({4}) as token:
            assert later.token() == token


@pytest.mark.parametrize("called_s", [0.0, 1e18, -1e300, float("nan"), float("inf")])
def test_nobody_waits_for_ever_for_a_later_life_that_is_gone(tmp_path, called_s):
    """Or that never was: a clock was wrong, or a stranger wrote it."""
    (tmp_path / MEETING).mkdir()
    content = json.dumps(called("0" * 16, 10**100, called_s=called_s))
    (tmp_path / MEETING / "call").write_text(content)
    meeting = Meeting(str(tmp_path))
    assert meeting.token({10**100}) == "0" * 16
    with meeting.called({5}) as token:
        assert meeting.token({5}) == token
    assert os.listdir(tmp_path) == []


def test_what_is_no_number_is_no_life(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    (tmp_path / MEETING).mkdir()
    lives = True, 9.5, "7", None, [8], -6
    content = json.dumps(called("0" * 16, *lives, called_s=1e9))
    (tmp_path / MEETING / "call").write_text(content)
    meeting = Meeting(str(tmp_path))
    assert meeting.token({1, 7, 8, 9}) is None
    assert meeting.token({-6}) == "0" * 16
    with meeting.called({0}) as token:
        assert meeting.token({0}) == token


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to itself", "huge"])
def test_what_nobody_told_is_not_read_and_written_over(tmp_path, kind):
    """Of some of it there is no end."""
    (tmp_path / MEETING).mkdir()
    call = tmp_path / MEETING / "call"
    match kind:
        case "pipe":
            os.mkfifo(call)
        case "link to a device":
            call.symlink_to("/dev/zero")
        case "link to itself":
            call.symlink_to("call")
        case "huge":
            call.touch()
            os.truncate(call, 2**30)
    meeting = Meeting(str(tmp_path))
    assert meeting.token() is None
    with meeting.called({1}) as token:
        assert meeting.token() == token
    assert os.listdir(tmp_path) == []


def test_a_directory_in_the_place_of_what_is_told_is_named(tmp_path):
    (tmp_path / MEETING / "call").mkdir(parents=True)
    meeting = Meeting(str(tmp_path))
    assert meeting.token() is None
    with pytest.raises(KeeperError, match=f"nothing can be told in .*/{MEETING}/call"):
        meeting.called({1}).__enter__()
    assert meeting.clear([1])
    assert os.listdir(tmp_path) == []


def test_what_is_no_whole_file_is_not_there(tmp_path):
    meeting = Meeting(str(tmp_path))
    for content in (b"", b'{"token": "a', b"[]", b"[" * 10**6):
        (tmp_path / MEETING).mkdir(exist_ok=True)
        (tmp_path / MEETING / "call").write_bytes(content)
        assert meeting.token() is None


@pytest.mark.parametrize("token", ["..", "../5", "", 5, ["a"], "a/b", "{tmp_path}/5"])
def test_what_names_another_folder_is_no_call_and_removes_nothing(tmp_path, token):
    token = token.format(tmp_path=tmp_path) if isinstance(token, str) else token
    (tmp_path / MEETING).mkdir()
    (tmp_path / MEETING / "call").write_text(json.dumps(called(token, 1)))
    (tmp_path / "5").mkdir()
    meeting = Meeting(str(tmp_path))
    assert meeting.token() is None
    with meeting.called({1}):
        pass
    assert os.listdir(tmp_path) == ["5"]


def test_waiting_has_an_end():
    with pytest.raises(KeeperError, match="nobody came within 0 s"):
        awaited(lambda: None, 0.0, "nobody came")
    assert awaited(lambda: 0, 0.0, "nobody came") == 0


def test_who_gives_up_ends_the_waiting_for_all(tmp_path):
    meeting = Meeting(str(tmp_path))
    with meeting.called({1}) as token:
        meeting.tell(token, "done-1", {"digest": 1})
        assert meeting.told_by_each(token, "done", {1}, 0.0) == {1: {"digest": 1}}
        with pytest.raises(KeeperError, match="a machine did not tell of `done` within 0 s"):
            meeting.told_by_each(token, "done", {1, 2}, 0.0)
        meeting.tell(token, "lost-2", {"why": "no room"})
        with pytest.raises(KeeperError, match="the machine of process 2 gave up: no room"):
            meeting.told_by_each(token, "done", {1, 2}, 60.0)


def test_nobody_waits_in_a_call_that_another_one_ended(tmp_path):
    """The two may have looked at the same moment, and found none."""
    meeting = Meeting(str(tmp_path))
    with meeting.called({1}) as first, meeting.called({1}) as second:
        for token, why in ((first, "another program calls"), (second, "did not tell of `done`")):
            with pytest.raises(KeeperError, match=why):
                meeting.told_by_each(token, "done", {1}, 0.0)


def test_what_cannot_be_told_matters_while_somebody_listens(tmp_path, monkeypatch):
    leader, other = Meeting(str(tmp_path)), Meeting(str(tmp_path))

    def fail(name, told):
        raise KeeperError("nothing can be told in it")

    monkeypatch.setattr(other, "_write", fail)
    with leader.called({1}) as token, pytest.raises(KeeperError, match="nothing can be told in"):
        other.tell(token, "lost-1", {})
    other.tell(token, "lost-1", {})


def test_a_tier_that_cannot_be_written_is_told_of(tmp_path):
    (tmp_path / MEETING).touch()
    meeting = Meeting(str(tmp_path))
    with pytest.raises(KeeperError, match="can be (told|heard) in"), meeting.called({1}):
        pass
