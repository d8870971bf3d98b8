"""What killed saves left is found, and removed only when that is asked for."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest

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


def test_a_negative_time_is_refused(run):
    for wrong in (-1, float("nan")):
        with pytest.raises(OptionError, match="quiet_s"):
            clean(run, quiet_s=wrong)
