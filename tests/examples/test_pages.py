"""Every block of code in the README and in the guides runs, or says why no test can run it."""

import pytest
from equipment import pages

NOT_RUN = [block for page in pages.PAGES for block in pages.blocks(page) if block.not_run]

# A restore that a page shows to fail leaves coroutines of Orbax behind, and reads that TensorStore
# ends when Orbax has closed its event loop.
pytestmark = [
    pytest.mark.usefixtures("restores_that_fail"),
    pytest.mark.filterwarnings(
        r"ignore:[\s\S]*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pages.run(page)


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_is_not_run_says_why(block):
    assert block.language == "python", "a shell command needs no reason"
    block.compiled()
    pytest.skip(f"{block.page.name}, line {block.line}: {block.not_run}")


def test_a_block_that_fails_is_found_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nassert step_that_no_page_defines\n```\n")
    with pytest.raises(NameError) as caught:
        pages.run(page)
    last = caught.traceback[-1]
    assert (last.path, last.lineno + 1) == (page, 4)


def test_a_reason_holds_for_the_next_block_only(tmp_path):
    page = tmp_path / "page.md"
    reason = "<!-- not run: it needs a bucket -->"
    page.write_text(
        f"{reason}\n\n```python\n1\n```\n```python\n2\n```\n{reason}\nText.\n```sh\n3\n```\n"
    )
    found = [(b.language, b.code, b.not_run) for b in pages.blocks(page)]
    assert found == [
        ("python", "1\n", "it needs a bucket"),
        ("python", "2\n", None),
        ("sh", "3\n", None),
    ]
