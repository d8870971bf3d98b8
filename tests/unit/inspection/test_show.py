"""The leaves of a checkpoint, of every kind."""

from __future__ import annotations

import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lazy_orbax.errors import OptionError
from lazy_orbax.inspection.diff import diff
from lazy_orbax.inspection.show import show


def leaves_of(path, *args, **keywords):
    (item,) = show(path, *args, **keywords).items
    return item.leaves


@pytest.mark.parametrize("run", ["stock", "v1", "lazy"])
def test_each_leaf_is_shown_with_what_was_saved(runs, run):
    by_name = {leaf.name: leaf for leaf in leaves_of(runs / run)}
    assert set(by_name) == {"layer.bias", "layer.kernel", "fixed", "n.0"}
    kernel, fixed = by_name["layer.kernel"], by_name["fixed"]
    assert (kernel.dtype, kernel.shape, kernel.chunk) == ("float32", (8, 4), (2, 2))
    assert (kernel.n_bytes, kernel.keys) == (128, ("layer", "kernel"))
    assert kernel.sharding == "(a, b) over a=4, b=2"
    assert (fixed.dtype, fixed.n_bytes) == ("bfloat16", 16)
    assert kernel.is_covered == (run == "lazy")
    assert kernel.stored_bytes >= 128 or run == "v1"


def test_of_a_run_the_newest_committed_step_is_shown(runs):
    assert show(runs / "lazy").path == str(runs / "lazy" / "12")
    assert show(runs / "torn").path == str(runs / "torn" / "2")
    torn = runs / "torn" / "12.orbax-checkpoint-tmp"
    assert len(leaves_of(torn)) == 4


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layer.*", {"layer.bias", "layer.kernel"}),
        ("layer/k*", {"layer.kernel"}),
        ("*e*", {"layer.bias", "layer.kernel", "fixed"}),
        ("nothing", set()),
    ],
)
def test_a_pattern_chooses_leaves(runs, pattern, found):
    assert {leaf.name for leaf in leaves_of(runs / "lazy", pattern)} == found


def test_the_sharding_of_one_leaf_is_drawn(runs):
    (item,) = show(runs / "lazy", "*kernel").items
    assert item.drawing == (
        "┌───┬───┐",
        "│ 0 │ 1 │",
        "├───┼───┤",
        "│ 2 │ 3 │",
        "├───┼───┤",
        "│ 4 │ 5 │",
        "├───┼───┤",
        "│ 6 │ 7 │",
        "└───┴───┘",
    )
    assert not show(runs / "lazy", "layer.*").items[0].drawing
    assert not show(runs / "lazy", "*bias").items[0].drawing


def test_leaves_are_sorted_and_put_together(runs):
    largest, *_ = leaves_of(runs / "lazy", sort="size")
    assert largest.name == "layer.kernel"
    names = [leaf.name for leaf in leaves_of(runs / "lazy", sort="name")]
    assert names == sorted(names)
    together = {leaf.name: leaf for leaf in leaves_of(runs / "lazy", depth=1)}
    assert set(together) == {"layer", "fixed", "n"}
    assert together["layer"].n_bytes == 128 + 16
    assert together["layer"].kind == "2 leaves"
    assert together["fixed"].dtype == "bfloat16"


def test_options_that_are_none_are_refused(runs):
    for wrong in ({"sort": "colour"}, {"depth": 0}):
        with pytest.raises(OptionError, match="wanted"):
            show(runs / "lazy", **wrong)
    with pytest.raises(OptionError, match="holds runs"):
        show(runs)


def test_a_run_without_a_committed_step_is_refused(tmp_path):
    (tmp_path / "run" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(OptionError, match="no committed step"):
        show(tmp_path / "run")


@pytest.mark.parametrize("step", [2, 12])
def test_what_is_malformed_is_told_of(runs, step):
    listing = show(runs / "hostile" / str(step))
    assert not listing.ok
    (item,) = listing.items
    assert item.storage == "malformed"
    assert str(runs / "hostile" / str(step)) in str(item.problems[0])


def test_the_tree_has_the_sizes_of_what_is_in_it(runs):
    (item,) = show(runs / "lazy").items
    root = item.tree().root
    layer = next(node for node in root.inner if node.name == "layer")
    assert (root.n_bytes, layer.n_bytes) == (item.n_bytes, 144)
    assert {node.name for node in layer.inner} == {"bias", "kernel"}


def test_the_working_directory_is_a_path_like_others(runs, monkeypatch):
    monkeypatch.chdir(runs / "lazy" / "2" / "default")
    assert len(leaves_of(".")) == 4
    assert show("..").items[0].leaves == leaves_of(".")


STEPS = pathlib.Path(__file__).parents[2] / "golden" / "steps"


@pytest.mark.parametrize("form", sorted(path.name for path in STEPS.iterdir()))
def test_steps_of_every_format_and_age_are_shown_alike(form):
    leaves = {leaf.name: leaf for leaf in leaves_of(STEPS / form)}
    shapes = {name: (leaf.dtype, leaf.shape, leaf.chunk) for name, leaf in leaves.items()}
    assert len(leaves) == 9
    assert shapes["half"] == ("bfloat16", (4, 6), (4, 3))
    assert shapes["epoch"] == ("int64", (), ())
    assert shapes["optimizer.1"] == ("", (), ())
    assert leaves["weights"].sharding == "(x) over x=2"
    assert leaves["weights"].stored_bytes >= 96
    assert diff(STEPS / form, STEPS / "plain_zarr3").ok


def test_an_item_that_is_no_tree_is_files(tmp_path):
    items = {
        "state": ocp.args.StandardSave({"w": np.ones(2)}),
        "config": ocp.args.JsonSave({"a": 1}),
    }
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=ocp.args.Composite(**items))
    config, state = sorted(show(tmp_path / "run").items, key=lambda item: item.name)
    assert (config.storage, config.leaves, config.problems) == ("files", (), ())
    assert len(state.leaves) == 1
    assert f"config: {config.n_leaves} files, " in str(config)
    assert "no digest" in show(tmp_path / "run")._repr_html_()
