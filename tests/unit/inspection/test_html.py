"""One page about a run, of every kind."""

from __future__ import annotations

import json
import shutil

import pytest

from lazy_orbax.errors import OptionError
from lazy_orbax.inspection.html import html


@pytest.mark.parametrize("run", ["stock", "v1", "lazy", "torn", "corrupt", "hostile", "evil"])
def test_every_run_has_a_page(runs, run):
    page = html(runs / run)
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")
    assert "<script" not in page
    assert page.count("<details") == page.count("</details>") > 0
    assert ("temporary" in page) == (run == "torn")
    assert ("malformed" in page) == (run == "hostile")


def test_a_page_has_the_tree_the_shardings_and_the_digest_state(runs):
    page = html(runs / "lazy" / "2", verify=True)
    for text in ("kernel", "float32  [8, 4]", "(a, b) over a=4, b=2", "│ 0 │ 1 │"):
        assert text in page
    assert "digests of 4 leaves" in page
    assert "default: ok, 4 leaves" in page
    assert "no digest" in html(runs / "stock" / "2" / "default")
    assert "CORRUPT" in html(runs / "corrupt", verify=True)


def test_timelines_beside_the_run_are_on_the_page(runs, tmp_path):
    shutil.copytree(runs / "stock", tmp_path / "run")
    assert "<h2>Time</h2>" not in html(tmp_path / "run")
    told = {"kind": "save", "at_s": 9, "directory": "r/7/x", "step": 7, "bytes_written": 1}
    (tmp_path / "run.timeline.jsonl").write_text(json.dumps(told | {"staged_s": 1}))
    page = html(tmp_path / "run")
    assert "<h2>Time</h2>" in page
    assert "step 7" in page


def test_what_is_no_checkpoint_has_no_page(runs, tmp_path):
    for wrong in (runs, tmp_path / "nothing"):
        with pytest.raises(OptionError):
            html(wrong)
