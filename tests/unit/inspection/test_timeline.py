"""Timelines in a file beside a run: written by saves, read as a table, a trace and a picture."""

from __future__ import annotations

import json

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from equipment.runs import EVIL

import lazy_orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.inspection.timeline import timeline, write_picture
from lazy_orbax.timeline import SaveTimeline


def line(**fields):
    told = {"kind": "save", "at_s": 1000.0, "host": "h", "pid": 1, "directory": "run/1/x"}
    told |= {"step": 1, "bytes_written": 10, "mode": "direct", "error": None}
    moments = {"enqueued_s": 0.5, "staged_s": 1.0, "durable_s": 2.0, "committed_s": 3.0}
    return json.dumps(told | moments | fields) + "\n"


def test_saves_and_restores_append_to_a_file_beside_the_run(tmp_path):
    append = lazy_orbax.timeline_file(tmp_path / "run.timeline.jsonl")
    options = lazy_orbax.LazyOptions(on_timeline=append, on_restore=append)
    handler = lazy_orbax.standard_handler(options=options)
    tree = {"w": jnp.arange(8.0)}
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
        manager.restore(2, args=ocp.args.StandardRestore(tree))
    found = timeline(tmp_path / "run")
    kinds = [(entry.kind, entry.step) for entry in found.entries]
    assert kinds == [("save", 1), ("save", 2), ("restore", None)]
    save = found.entries[0]
    assert save.n_bytes == 32
    moments = [moment for moment in save.moments.values() if moment is not None]
    assert moments == sorted(moments)
    assert len(moments) >= 4
    assert save.began_s < found.entries[1].began_s
    assert "step 2" in str(found)


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    for wrong in (tmp_path, tmp_path / "no" / "such.jsonl", "gs://bucket/run.timeline.jsonl"):
        with pytest.raises(OptionError, match="cannot be written"):
            lazy_orbax.timeline_file(wrong)


def test_several_processes_and_lines_that_are_none_of_ours(tmp_path):
    (tmp_path / "run.1.timeline.jsonl").write_text(line(pid=2, at_s=900.0))
    others = ["{", "[]", "null", '{"kind": "lunch"}', line(at_s="noon"), line(staged_s=-1.0)]
    others += [line(bytes_written=float("inf")), line(at_s=10**400)]
    others += [line(bytes_written="x"), "[" * 10**6, line(durable_s=float("nan")), line()[:50]]
    ours = line(step=2, directory=EVIL, error=EVIL)
    (tmp_path / "run.0.timeline.jsonl").write_text(
        ours + "\n".join(each.strip() for each in others)
    )
    found = timeline(tmp_path / "run")
    assert [(entry.step, entry.process) for entry in found.entries] == [(1, "h 2"), (2, "h 1")]
    assert found.n_unreadable == len(others)
    assert EVIL not in str(found)
    assert "<script>" not in found._repr_html_()


def test_a_trace_has_a_span_for_each_part_and_lanes_for_what_overlaps(tmp_path):
    file = tmp_path / "run.timeline.jsonl"
    # Two overlap, the third begins when both are over.
    file.write_text(line() + line(step=2, at_s=1001.0) + line(step=3, at_s=1010.0, error="disk"))
    trace = timeline(file).trace()
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    whole = {event["name"]: event for event in spans if event["name"].startswith("save")}
    assert [whole[f"save step {n}"]["tid"] for n in (1, 2, 3)] == [1, 2, 1]
    assert [whole[f"save step {n}"]["ts"] for n in (1, 2, 3)] == [0, 1e6, 10e6]
    assert whole["save step 3"]["args"]["error"] == "disk"
    first = [e for e in spans if e["tid"] == 1 and e["ts"] < 3e6 and e["name"] != "save step 1"]
    assert [(e["name"], e["ts"], e["dur"]) for e in first] == [
        ("until enqueued", 0, 0.5e6),
        ("until staged", 0.5e6, 0.5e6),
        ("until durable", 1e6, 1e6),
        ("until committed", 2e6, 1e6),
    ]
    json.dumps(trace, allow_nan=False)


def test_a_picture_needs_a_save(tmp_path):
    file = tmp_path / "run.timeline.jsonl"
    file.write_text(line(kind="restore", bytes_read=7))
    with pytest.raises(OptionError, match="no save"):
        write_picture(timeline(file), tmp_path / "a.png")


def test_without_a_file_the_error_says_how_to_get_one(tmp_path):
    with pytest.raises(OptionError, match=r"timeline_file\(.*run.timeline.jsonl"):
        timeline(tmp_path / "run")


def test_a_timeline_is_seen():
    told = SaveTimeline(directory=EVIL, step=1, enqueued_s=0.1, durable_s=1.0, bytes_written=5)
    assert "enqueued 100 ms" in str(told)
    assert "<script>" not in told._repr_html_()
