"""What killed saves left is found, and removed only when that is asked for."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest

from lazy_orbax._paths import MEETING
from lazy_orbax.errors import OptionError
from lazy_orbax.inspection.clean import clean

OLD_S = 1e9


@pytest.fixture
def run(runs, tmp_path):
    """A run with a step that was killed long ago, and one that is being saved."""
    run = pathlib.Path(shutil.copytree(runs / "torn", tmp_path / "run"))
    killed, running = run / "12.orbax-checkpoint-tmp", run / "13.orbax-checkpoint-tmp"
    shutil.copytree(killed, running)
    for path in (*killed.rglob("*"), killed):
        os.utime(path, (OLD_S, OLD_S))
    return run


def everything(place):
    return sorted(str(path) for path in place.rglob("*"))


def test_nothing_is_removed_unless_that_is_asked_for(run):
    before = everything(run)
    killed, running = clean(run).directories
    assert everything(run) == before
    assert (killed.path, killed.kept, killed.removed) == (
        str(run / "12.orbax-checkpoint-tmp"),
        None,
        False,
    )
    assert killed.quiet_s > 1e6
    assert "just now" in (running.kept or "")
    assert killed.n_bytes == sum(
        path.stat().st_size for path in pathlib.Path(killed.path).rglob("*") if path.is_file()
    )
    assert "would be removed" in str(clean(run))


def test_what_was_left_is_removed_and_all_else_stays(run):
    left = [path for path in everything(run) if "12.orbax-checkpoint-tmp" not in path]
    report = clean(run, dry_run=False)
    assert report.ok
    assert [each.removed for each in report.directories] == [True, False]
    assert everything(run) == left
    assert clean(run, dry_run=False, quiet_s=0).directories[0].removed
    assert {path.name for path in run.iterdir()} == {"1", "2"}


def test_a_link_is_kept_and_so_is_what_a_link_within_leads_to(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (run / "12.orbax-checkpoint-tmp" / "link").symlink_to(outside)
    (run / "14.orbax-checkpoint-tmp").symlink_to(outside)
    report = clean(run, dry_run=False, quiet_s=0)
    fates = {pathlib.Path(each.path).name: each.removed for each in report.directories}
    assert fates["12.orbax-checkpoint-tmp"]
    assert not fates["14.orbax-checkpoint-tmp"]
    assert (outside / "file").read_text() == "mine"


@pytest.mark.parametrize("has_steps", [True, False])
def test_what_killed_keepers_told_each_other_in_a_tier_is_removed(run, tmp_path, has_steps):
    tier = run if has_steps else tmp_path / "tier"
    told = tier / MEETING / ("0" * 16) / "here-1"
    told.parent.mkdir(parents=True)
    told.write_text("{}")
    (now, *_) = clean(tier, dry_run=False).directories
    assert "just now" in (now.kept or "")
    for path in (told, told.parent, told.parent.parent):
        os.utime(path, (OLD_S, OLD_S))
    (old, *_) = clean(tier).directories
    assert (old.path, old.n_bytes, old.kept) == (str(tier / MEETING), 2, None)
    assert clean(tier, dry_run=False).directories[0].removed
    assert not (tier / MEETING).exists()
    assert (run / "2").is_dir()
    (tier / MEETING).symlink_to(tmp_path)
    assert clean(tier, dry_run=False, quiet_s=0).directories[0].kept == "it is a link"


def test_a_negative_time_is_refused(run):
    for wrong in (-1, float("nan")):
        with pytest.raises(OptionError, match="quiet_s"):
            clean(run, quiet_s=wrong)
