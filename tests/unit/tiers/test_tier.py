"""A tier says what it is, and is a directory of its own; its job has one keeper."""

import os

import pytest

import lazy_orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.pods import consensus
from lazy_orbax.tiers.tier import checked_tiers, told_of


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
    assert told_of(found) == [{"path": "/nvme/run", "every_s": 60, "keep": 2}]


def test_a_job_on_two_machines_is_refused(monkeypatch, place):
    monkeypatch.setattr(consensus, "from_first", lambda numbers, most: [numbers[0] ^ 1])
    monkeypatch.setattr(consensus, "which_processes", lambda flag: [3] if flag else [])
    with pytest.raises(OptionError, match="process 3 has another than process 0"):
        checked_tiers([tier()], "/run", place)
    assert checked_tiers([], "/run", place) == ()
