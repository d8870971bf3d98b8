"""The README and the guides: commands that run, links that lead somewhere, names that exist."""

import dataclasses
import inspect
import re

import pytest
from equipment import pages

import lazy_orbax

MOST_LINES = 150
MOST_COLUMNS = 118


def commands():
    return [
        block.code.rstrip("\n") for block in pages.blocks(pages.README) if block.language == "sh"
    ]


def test_ci_runs_the_readmes_test_command():
    (test_command,) = [command for command in commands() if "pytest" in command]
    assert test_command in (pages.ROOT / ".ci" / "run").read_text().splitlines()


def test_the_main_job_is_one_command_that_makes_its_environment():
    (command,) = [command for command in commands() if "train_lm.py" in command]
    script = command.split()[-2]
    assert (pages.ROOT / script).is_file()
    assert command.startswith("python3 -m venv ")


def test_the_readme_is_one_page():
    assert len(pages.README.read_text().splitlines()) <= MOST_LINES


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    measured = (
        pages.README.read_text().partition("<!-- figures -->")[2].partition("<!-- /figures -->")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in measured.splitlines() if line.startswith("|")]
    _, _, *rows = rows
    tables = (pages.ROOT / "benchmarks" / "README.md").read_text()
    assert rows
    for _, what, *cells in rows:
        # There each median has its range in brackets behind it.
        wanted = [re.escape(what), *(rf"{re.escape(cell.strip('*'))} \([^)]*\)" for cell in cells)]
        assert re.search(r"\| " + r" \| ".join(wanted) + r" \|", tables), f"{what}: {cells}"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_every_link_leads_somewhere(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in pages.anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_lines_can_be_read_without_scrolling(page):
    # A row of a table cannot be broken.
    prose = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > MOST_COLUMNS]


def test_the_readme_links_to_every_guide():
    linked = {
        (pages.README.parent / link.partition("#")[0]).resolve()
        for link in pages.links(pages.README)
    }
    assert set(pages.PAGES[1:]) <= linked


def all_guides():
    return "\n".join(page.read_text() for page in pages.PAGES[1:])


def mentions(text, name):
    return re.search(rf"\b{re.escape(name)}\b", text)


def test_every_public_name_is_in_a_guide():
    # As code: `verify` and `args` are words as well.
    text = all_guides()
    names = [*lazy_orbax.__all__, *lazy_orbax.reports.__all__]
    as_code = r"(\blazy_orbax\.|\breports\.|`)"
    assert not [name for name in names if not re.search(rf"{as_code}{name}\b", text)]


def test_every_exception_is_explained():
    errors = {
        name
        for name, value in vars(lazy_orbax.errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    page = (pages.GUIDES / "errors.md").read_text()
    assert "SaveError" in errors
    assert not [name for name in errors if not mentions(page, name)]


def test_every_option_is_explained():
    page = (pages.GUIDES / "options.md").read_text()
    fields = [field.name for field in dataclasses.fields(lazy_orbax.LazyOptions)]
    assert not [name for name in fields if f"| `{name}` |" not in page]


def test_what_the_guides_call_public_exists():
    for name in set(
        re.findall(r"\blazy_orbax\.(\w+)\b(?!/)", all_guides() + pages.README.read_text())
    ):
        assert name in lazy_orbax.__all__, f"a page names lazy_orbax.{name}"
    for name in set(re.findall(r"\blazy_orbax\.reports\.(\w+)\b", all_guides())):
        assert name in lazy_orbax.reports.__all__, f"a page names reports.{name}"


def test_what_names_a_page_names_one_that_is_there():
    """Docstrings, error texts and other pages refer to pages by their path."""
    sources = [
        path
        for folder in ("lazy_orbax", "examples", "benchmarks", "tests")
        for path in (pages.ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md")
    ]
    for source in sources:
        for path in re.findall(r"\bexamples/[\w/]+\.md\b", source.read_text()):
            assert (pages.ROOT / path).is_file(), f"{source} names {path}"
