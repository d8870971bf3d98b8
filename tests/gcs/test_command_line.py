"""`lazy-orbax` looks at checkpoints in a bucket as it does at those in a directory."""

from __future__ import annotations

import json


def test_every_command_that_reads_reads_a_bucket(start, root, tmp_path):
    job = start()
    job.do("open", root)
    for step in (1, 2, 3):
        job.do("save", step)
    job.do("tear", 3)

    def found(*arguments, status=0):
        got, out = job.do("command", *arguments, "--json")
        assert got == status, out
        return json.loads(out)

    steps = found("ls", root)["steps"]
    assert [(step["step"], step["state"]) for step in steps] == [
        (1, "committed"),
        (2, "committed"),
        (3, "torn"),
    ]
    assert {step["written_by"] for step in steps} == {"lazy_orbax"}
    assert all(step["n_bytes"] > 1000 for step in steps)
    assert found("ls", root.rpartition("/")[0])["runs"]
    (item,) = found("show", root)["items"]
    assert item["path"] == f"{root}/2/default"
    assert item["n_leaves"] == len(item["leaves"]) > 1
    assert found("diff", f"{root}/1", f"{root}/1", "--stats")["n_same"] == item["n_leaves"]
    changed = found("diff", f"{root}/1", f"{root}/2", "--stats", status=1)["leaves"]
    assert all(leaf["n_different"] > 0 for leaf in changed)
    assert found("du", root)["n_compared"] == 2
    (report,) = found("verify", root, status=1)
    assert ["never committed" in problem["what"] for problem in report["problems"]] == [True]
    assert "</html>" in found("html", root)["page"]
    exported = found("export", root, str(tmp_path / "out"))
    assert exported["verified"]
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert found("bench", root.rpartition("/")[0], "--mebibytes", "16")["n_bytes"] == 2**24
    (torn,) = found("clean", root)["directories"]
    assert (torn["path"], torn["removed"]) == (f"{root}/3", False)
    (torn,) = found("clean", root, "--remove", "--quiet-minutes", "0")["directories"]
    assert torn["removed"]
    assert [step["step"] for step in found("ls", root)["steps"]] == [1, 2]
