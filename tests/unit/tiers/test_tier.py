"""A tier says what it is, and is a directory of its own; all machines of its job see it."""

import json
import os

import jax
import pytest

import lazy_orbax
from lazy_orbax._paths import MEETING
from lazy_orbax.errors import OptionError
from lazy_orbax.pods import consensus
from lazy_orbax.tiers.tier import Machine, checked_tiers, heard_of, told_of


def tier(path="/nvme/run", **keywords):
    return lazy_orbax.Tier(path, **{"every_s": 60, **keywords})


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"path": ""}, "path=''"),
        ({"path": 3}, "path=3"),
        ({"every_s": 0}, "every_s=0"),
        ({"every_s": float("nan")}, "every_s=nan"),
        ({"every_s": "often"}, "every_s='often'"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
    ],
)
def test_what_is_out_of_range_is_refused(keywords, said):
    with pytest.raises(OptionError, match=said):
        tier(**keywords)


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        ([tier("/run/")], "/run is another"),
        ([tier(), tier("/nvme/../nvme/run")], "/nvme/run is another"),
        ([tier("gs://b/run"), tier("gs://b/run/")], "gs://b/run is another"),
        ([tier("gs://b/run"), tier("gs://b//./run/x")], "found gs://b/run"),
        (["/nvme/run"], "must be a list of"),
        (tier(), "must be a list of"),
    ],
)
def test_a_tier_has_a_directory_of_its_own(tiers, said, place):
    with pytest.raises(OptionError, match=said):
        lazy_orbax.Keeper("/run", directory=place, tiers=tiers)
    assert not os.path.exists(place)


@pytest.mark.parametrize("where", ["link", "run/5", "run/tier", "."])
def test_a_tier_is_neither_in_the_run_nor_around_it(tmp_path, where, place):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for path in (tmp_path / where, f"/{tmp_path / where}"):
        with pytest.raises(OptionError, match="or the run"):
            checked_tiers([tier(path)], str(tmp_path / "run"), place)
    checked_tiers([tier(tmp_path / "run-tier")], str(tmp_path / "run"), place)


def test_a_keeper_hears_the_fields(place):
    found = checked_tiers([tier(keep=2)], "/run", place)
    assert told_of(*found) == [{"path": "/nvme/run", "every_s": 60, "keep": 2}]


def test_a_program_hears_of_the_tier_and_the_machine():
    for machine in (None, Machine((2, 3), 4)):
        (told,) = told_of([tier()], machine)
        assert heard_of(json.loads(json.dumps(told))) == (tier(), machine)


@pytest.fixture
def two_machines(monkeypatch):
    """Lets this process be the third of four, with the fourth one on its machine."""
    monkeypatch.setattr(consensus, "of_each", lambda number: [1, 2, number, number])
    monkeypatch.setattr(consensus, "which_processes", lambda flag: [2] if flag else [])
    monkeypatch.setattr(jax, "process_index", lambda: 2)


@pytest.mark.usefixtures("two_machines")
def test_the_tiers_of_a_job_on_several_machines_are_shared(monkeypatch, place, tmp_path):
    monkeypatch.setattr(consensus, "from_first", lambda numbers, most: [7])
    with pytest.raises(OptionError, match="is not shared: process 2 does not find there"):
        checked_tiers([tier(tmp_path)], "/run", place)
    (tmp_path / f"{MEETING}-7").mkdir()  # It cannot be read.
    with pytest.raises(OptionError, match="is not shared: process 2 does not find there"):
        checked_tiers([tier(tmp_path)], "/run", place)
    (tmp_path / f"{MEETING}-7").rmdir()
    (tmp_path / f"{MEETING}-7").write_bytes(b"shared")  # As process 0 does.
    assert checked_tiers([tier(tmp_path)], "/run", place)[1] == Machine((2, 3), 4)
    assert checked_tiers([], "/run", place) == ((), None)


@pytest.mark.usefixtures("two_machines")
def test_process_0_writes_what_the_others_look_for_and_removes_it(monkeypatch, place, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert checked_tiers([tier(tmp_path / "tier")], "/run", place)[1] == Machine((2, 3), 4)
    assert os.listdir(tmp_path / "tier") == []
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="process 0 cannot write to the tier"):
        checked_tiers([tier(tmp_path / "file")], "/run", place)
