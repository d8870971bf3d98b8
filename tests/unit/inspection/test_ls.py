"""The steps of a run, of every kind."""

from __future__ import annotations

import pathlib
import shutil

import pytest

import lazy_orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.inspection import looking
from lazy_orbax.inspection.ls import ls
from lazy_orbax.inspection.show import show
from lazy_orbax.view.text import size_of


@pytest.mark.parametrize(
    ("run", "writer", "covered"),
    [("stock", "Orbax", False), ("v1", "Orbax v1", False), ("lazy", "lazy_orbax", True)],
)
def test_each_step_is_listed_with_who_wrote_it(runs, run, writer, covered):
    listing = ls(runs / run)
    assert listing.ok
    assert [entry.step for entry in listing.steps] == [1, 2, 12]
    for entry in listing.steps:
        files = [f for f in (runs / run / str(entry.step)).rglob("*") if f.is_file()]
        assert entry.state == "committed"
        assert entry.n_files == len(files)
        assert entry.n_bytes == sum(f.stat().st_size for f in files)
        assert entry.written_by == writer
        assert bool(entry.with_digests) == covered
        assert entry.saved_at_s == pytest.approx(files[0].stat().st_mtime, abs=60)


def test_a_torn_step_is_marked(runs):
    states = [(entry.step, entry.state) for entry in ls(runs / "torn").steps]
    assert states == [(1, "committed"), (2, "committed"), (12, "temporary")]
    assert "temporary" in str(ls(runs / "torn"))


def test_a_run_whose_first_save_was_killed_is_a_run(tmp_path):
    (tmp_path / "run" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    (entry,) = ls(tmp_path / "run").steps
    assert (entry.step, entry.state, entry.n_bytes) == (0, "temporary", 0)


def test_what_is_no_file_is_told_of_and_the_others_are_listed(runs):
    listing = ls(runs / "hostile")
    assert not listing.ok
    assert [entry.state for entry in listing.steps] == ["committed", "committed", "malformed"]
    assert "special file" in (listing.steps[-1].problem or "")


def test_metadata_of_a_step_are_data(runs, tmp_path):
    run = shutil.copytree(runs / "stock", tmp_path / "run")
    (run / "1" / "_CHECKPOINT_METADATA").write_text("[" * 10**6)
    (run / "2" / "_CHECKPOINT_METADATA").write_text('{"item_handlers": [7]}')
    fields = '{"item_handlers": {}, "commit_timestamp_nsecs": "soon"}'
    (run / "12" / "_CHECKPOINT_METADATA").write_text(fields)
    first, second, third = ls(run).steps
    assert "nested too deeply" in (first.problem or "")
    assert "no object" in (second.problem or "")
    assert (third.problem, third.saved_at_s, third.written_by) == (None, None, "-")


def test_one_directory_too_high_lists_the_runs(runs):
    assert set(ls(runs).runs) == set(map(str, runs.iterdir()))


def test_checkpoints_that_are_of_no_run_are_listed_beside_runs(runs, tmp_path):
    """As Flax's guides save them, in one directory: each with a name that is no step's."""
    shutil.copytree(runs / "lazy", tmp_path / "managed")
    for name in ("pure_dict", "state"):
        shutil.copytree(runs / "lazy" / "1" / "default", tmp_path / name)
        shutil.copy(runs / "lazy" / "1" / "_CHECKPOINT_METADATA", tmp_path / name)
    listing = ls(tmp_path)
    assert listing.runs == (str(tmp_path / "managed"),)
    assert [pathlib.Path(entry.path).name for entry in listing.steps] == ["pure_dict", "state"]
    assert {(entry.step, entry.state, entry.items) for entry in listing.steps[1:]} == {
        (None, "committed", ("state",))
    }
    assert listing.ok
    assert str(tmp_path / "managed") in str(listing)
    found = "holds runs and checkpoints. Give one:\n.*managed\n.*pure_dict\n.*state"
    for verb in (show, lazy_orbax.verify):
        with pytest.raises(OptionError, match=found):
            verb(tmp_path)
    assert lazy_orbax.verify(tmp_path / "state").is_whole
    shutil.rmtree(tmp_path / "managed")
    assert ls(tmp_path).runs == ()
    assert str(ls(tmp_path)).endswith(f"2 steps, {size_of(2 * listing.steps[0].n_bytes)}")


def test_what_is_no_run_is_refused(runs, tmp_path):
    with pytest.raises(OptionError, match="is a step"):
        ls(runs / "lazy" / "1")
    with pytest.raises(OptionError, match="is an item"):
        ls(runs / "lazy" / "1" / "default")
    with pytest.raises(OptionError, match="holds no checkpoint"):
        ls(tmp_path)
    with pytest.raises(OptionError, match="not a directory"):
        ls(tmp_path / "nothing")
    with pytest.raises(OptionError, match="Give a path"):
        ls(7)


def test_a_step_that_goes_away_meanwhile_is_left_out(runs, tmp_path, monkeypatch):
    run = pathlib.Path(shutil.copytree(runs / "torn", tmp_path / "run"))
    survey, gone = looking.survey, {"1": "1", "12.orbax-checkpoint-tmp": "12"}

    def survey_late(directory):
        name = pathlib.Path(directory).name
        if name == "1":
            shutil.rmtree(directory)  # The manager keeps no more steps.
        elif name in gone:
            (run / name).rename(run / gone[name])  # It is published.
        return survey(directory)

    monkeypatch.setattr(looking, "survey", survey_late)
    assert [entry.step for entry in ls(run).steps] == [2]
    assert [entry.step for entry in ls(run).steps] == [2, 12]


def test_what_changes_in_a_step_that_is_being_saved_is_no_fault(runs, tmp_path):
    run = pathlib.Path(shutil.copytree(runs / "torn", tmp_path / "run"))
    (run / "12.orbax-checkpoint-tmp" / "gone").symlink_to("nowhere")
    assert ls(run).ok
    (run / "2" / "gone").symlink_to("nowhere")
    assert [entry.state for entry in ls(run).steps] == ["committed", "malformed", "temporary"]
