"""One process fails: the save fails on all, each says who, where and why, and the next works."""

from __future__ import annotations

import pytest
from equipment.pods.jobs import reports, run_job


def test_a_failure_of_one_process_is_told_to_all(tmp_path):
    processes = reports(run_job(2, "failing", tmp_path / "run", logs=tmp_path))
    n_cases = 13
    assert len(processes[0]["failed"]) == n_cases
    for process in processes:
        for case, outcome in process["failed"].items():
            place, _, culprit = case.rpartition(" on ")
            assert outcome.get("kind") == "SaveError", (case, outcome)
            assert outcome["process"] == int(culprit), (case, outcome)
            assert f"process {culprit}" in outcome["message"]
            if place == "storage":
                assert "ocdbt.process_" + culprit in outcome["message"]
                assert outcome["leaf"], outcome
            else:
                assert f"no luck at {place}" in outcome["message"]
            assert outcome["s"] < 10, (case, outcome)
        assert process["again"].keys() == process["failed"].keys()
        assert not [case for case, outcome in process["again"].items() if "kind" in outcome]
        assert process["steps"] == [*range(1, n_cases + 1), n_cases + 2]
        assert process["timelines"] == [False, True] * (n_cases + 1)
        assert process["own_left"] == process["left"] == []
        assert process["in_flight"] == 0


def test_an_item_that_fails_takes_the_other_with_it(tmp_path):
    for process in reports(run_job(2, "two_items", tmp_path / "run", logs=tmp_path)):
        assert process["failed"]["process"] == 1
        assert "no luck at finish" in process["failed"]["message"]
        assert "kind" not in process["again"]
        assert process["steps"] == [1]
    assert {path.name for path in (tmp_path / "run" / "1").iterdir()} >= {"a", "b"}


def test_a_process_that_hangs_is_named_within_the_timeout(tmp_path):
    first, last = reports(run_job(2, "hanging", tmp_path / "run", logs=tmp_path))
    assert first["failed"]["process"] == 1
    assert last["failed"]["kind"] == "TimeoutError"
    for process in (first, last):
        assert 2 < process["failed"]["s"] < 15
        assert "kind" not in process["again"]
        assert process["steps"] == [2]


def test_all_skip_the_same_saves_when_one_is_busy(tmp_path):
    for process in reports(run_job(2, "busy", tmp_path / "run", logs=tmp_path)):
        assert process["saved"] == [True, False, False, True]
        assert process["steps"] == [1, 4]


@pytest.mark.parametrize("n", [2])
def test_disks_that_are_not_shared(tmp_path, n):
    processes = reports(run_job(n, "node_local", tmp_path / "run", logs=tmp_path))
    for process in processes:
        # The step that failed on one disk is on none.
        assert process["steps"] == [1, 2, 3]
        assert process["failed"]["process"] == 1
        assert "no luck at finish" in process["failed"]["message"]
        assert process["wrong"] == []
    for i in range(n):
        files = tmp_path / "run" / f"disk_of_{i}" / "3" / "default"
        assert (files / "_METADATA").is_file()
        assert [d.name for d in files.glob("ocdbt.process_*")] == [f"ocdbt.process_{i}"]


def test_processes_agree_on_what_is_corrupt(tmp_path):
    both = reports(run_job(2, "corrupted", tmp_path / "run", logs=tmp_path / "logs"))
    for report in both:
        assert report["whole"]
        assert (report["step"], report["differences"]) == (2, [])
        assert len(report["problems"]) == 1
        assert "ocdbt.process_1/" in report["problems"][0]
        assert report["replaced"] == [[report["leaf"], "step 2"]]
        assert {text.split()[0] for text in report["left"]} <= {report["leaf"]}
        assert any("process_1" in text and "missing" in text for text in report["without"])
    kinds = sorted(report["plain"]["kind"] for report in both)
    assert kinds == ["CorruptCheckpointError", "RestoreError"]
    reasons = [report["skipped"][0] for report in both]
    assert sum("another process" in reason for reason in reasons) == 1


def test_a_flipped_bit_fails_the_restore_on_all_whoever_reads_it(tmp_path):
    processes = reports(run_job(4, "flipped", tmp_path / "run", logs=tmp_path / "logs"))
    for target, readers in {"same": [2], "other": [0, 1, 2, 3]}.items():
        failed = [process["failed"][target] for process in processes]
        kinds = [one.get("kind") for one in failed]
        assert [i for i, kind in enumerate(kinds) if kind == "CorruptCheckpointError"] == readers
        for i, one in enumerate(failed):
            assert one["s"] < 30, one
            if i in readers:
                assert "ocdbt.process_2" in one["message"], one
            else:
                assert one["kind"] == "RestoreError", one
                assert "process 2 failed" in one["message"], one
    assert [process["wrong"] for process in processes] == [[]] * 4
