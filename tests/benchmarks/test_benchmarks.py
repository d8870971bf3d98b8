"""The benchmarks run, and their records and report are complete. No speed is asserted."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from benchmarks import plots

ROOT = pathlib.Path(__file__).parents[2]
SAVING = {"stock_default", "stock_best", "lazy"}
FIELDS = {"part", "workload", "peer", "metric", "unit", "values", "median", "min", "max", "trace"}
FIELDS |= {"time", "size", "versions", "hardware"}
# What every peer that saves must have, by part.
METRICS = {
    "stall": {"added_loop", "added_cpu", "save", "step_after_save", "tail", "first_save", "trace"},
    "throughput": {"enqueued", "committed", "restore", "disk", "cpu", "timeline"},
    "memory": {"state", "peak", "growth", "kept"},
    "scale": {"first_save", "later_save", "later_committed", "later_cpu"},
    "pods": {"save", "committed", "cpu"},
    "gpu": {"added_loop", "save", "step_after_save"},
}


def run(module: str, *flags: object) -> None:
    # The benchmarks choose their own devices.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> pathlib.Path:
    """The records of every part, at a size that proves nothing but that they run."""
    directory = tmp_path_factory.mktemp("benchmarks")
    out, flags = directory / "out.jsonl", ("--size", "tiny", "--directory", directory)
    for parts, workloads, repeats in (
        ("stall,throughput", "many_small,transformer", 2),
        ("memory,scale,pods", "many_small", 1),
        ("exchanges", "many_small", 1),
        ("gpu", "transfers,view_of_pinned,fused_step,modes,in_step,headroom", 1),
    ):
        chosen = ("--parts", parts, "--workloads", workloads, "--repeats", repeats)
        run("benchmarks", "--out", out, *flags, *chosen)
    chosen = ("--parts", "stall", "--workloads", "few_large", "--repeats", 2)
    run("benchmarks", "--out", out, *flags, *chosen, "--peers", "in_step")
    assert [path.name for path in directory.iterdir()] == [out.name], "checkpoints are left behind"
    return out


@pytest.fixture(scope="module")
def records(measured) -> list[dict]:
    return [json.loads(line) for line in measured.read_text().splitlines()]


@pytest.mark.slow
def test_every_record_is_complete(records):
    for record in records:
        assert record.keys() == FIELDS
        assert set(record["versions"]) == {"jax", "orbax", "tensorstore", "lazy_orbax", "python"}
        assert record["hardware"].keys() == {
            "cpu",
            "cores",
            "memory_bytes",
            "file_system",
            "accelerator",
        }
        numbers = [value for value in record["values"] if isinstance(value, int | float)]
        if numbers:
            assert record["min"] == min(numbers)
            assert record["max"] == max(numbers)
            assert record["min"] <= record["median"] <= record["max"]
        else:
            assert record["unit"] == "text"


@pytest.mark.slow
@pytest.mark.parametrize("part", METRICS)
def test_every_peer_has_every_metric(records, part):
    for peer in SAVING:
        found = {r["metric"] for r in records if r["part"] == part and r["peer"] == peer}
        assert found >= METRICS[part], peer


WAYS = {
    "lazy_stage": "stage",
    "lazy_direct": "direct",
    "no_donation": "direct",
    "split": "direct",
    "in_step": "in_step",
}


@pytest.mark.slow
def test_every_mode_is_measured_beside_the_others(records):
    found = {
        (r["peer"], r["metric"]): r
        for r in records
        if (r["part"], r["workload"]) == ("gpu", "modes")
    }
    for way, mode in WAYS.items():
        for metric in ("added_loop", "save", "step_after_save"):
            assert found[way, metric]["unit"] == "s"
        told = set(found[way, "mode"]["values"])
        assert {text.split(" (")[0] for text in told} == {mode}
    assert found["none", "loop"]["median"] > 0


@pytest.mark.slow
def test_exchanges_are_measured_beside_saves_without_them(records):
    found = {(r["peer"], r["metric"]) for r in records if r["part"] == "exchanges"}
    for peer in ("keeper", "keeper_with_parity"):
        assert {(peer, "added_loop"), (peer, "save"), (peer, "added_cpu"), (peer, "tail")} <= found
    nodes = {("keeper_with_parity", name) for name in ("node_cpu", "exchange", "sent")}
    assert nodes <= found


@pytest.mark.slow
def test_what_the_copy_in_the_step_costs_is_told(records):
    found = {
        (r["peer"], r["metric"])
        for r in records
        if (r["part"], r["workload"]) == ("gpu", "in_step")
    }
    wanted = {("in_step", "step_with_copy"), ("in_step", "copy_hidden")}
    wanted |= {("raw", "step"), ("raw", "copy_alone")}
    assert found >= wanted
    assert {("raw", "temporary_device_memory"), ("in_step", "temporary_device_memory")} <= found


def test_every_peer_of_a_picture_has_a_color_of_its_own():
    names = ["none", "floor", *SAVING, "lazy_stage", "lazy_direct", "lazy_zarr3", "split"]
    names += ["in_step", "no_donation", "lazy_files", "lazy_zarr3_files", "lazy_compressed"]
    found = plots.colors(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert plots.colors(names[:5]) == {name: found[name] for name in names[:5]}


@pytest.mark.slow
def test_one_run_for_each_repeat(records):
    loops = [r for r in records if r["part"] == "stall" and r["metric"] == "loop"]
    steps = {"many_small/idle", "transformer/idle", "few_large/idle"}
    assert {r["workload"] for r in loops} == steps
    assert {r["peer"] for r in loops} == SAVING | {"none", "floor", "in_step"}
    assert all(len(r["values"]) == 2 for r in loops)


@pytest.mark.slow
def test_a_lazy_save_tells_its_moments_in_order(records):
    wanted = ("throughput", "lazy", "timeline")
    timelines = [r["trace"] for r in records if (r["part"], r["peer"], r["metric"]) == wanted]
    assert len(timelines) == 2
    for timeline in timelines:
        assert 0 < timeline["staged"] <= timeline["durable"] <= timeline["committed"]
        assert timeline["enqueued"] <= timeline["committed"]


@pytest.mark.slow
def test_the_ceilings_of_the_same_directory_are_there(records):
    raw = {r["metric"] for r in records if r["part"] == "throughput" and r["peer"] == "raw"}
    assert raw >= {"durable_write", "durable_write_threads", "read", "memcpy", "dispatch", "state"}


@pytest.mark.slow
def test_the_report_is_made_from_the_records(measured, tmp_path):
    pytest.importorskip("matplotlib")
    readme, plots = tmp_path / "README.md", tmp_path / "plots"
    shutil.copy(ROOT / "benchmarks" / "README.md", readme)
    run("benchmarks.report", measured, "--readme", readme, "--plots", plots)
    text = readme.read_text()
    assert "Not measured yet." not in text
    assert text.count("| added loop time per checkpoint |") >= 2
    assert text.count("lazy vs stock best") >= 4
    assert "| in_step (in_step: the step had copied it to pinned host memory) |" in text
    for image in ("timeline.png", "steps.png"):
        assert (plots / image).read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{image})" in text
    # A second time replaces what the first one wrote.
    run("benchmarks.report", measured, "--readme", readme, "--plots", plots)
    assert readme.read_text() == text
