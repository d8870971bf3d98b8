"""The README and the guides: their code, their links, and how a test runs the code of a page.

A page is one program. Its Python blocks run in order, in one namespace, in an empty directory. The
first block of `quickstart.md` runs before them, because every page uses its names. Lines of a `sh`
block that begin with `lazy-orbax` run as well. A block after `<!-- not run: reason -->`
is only compiled.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from typing import Any

from lazy_orbax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = ROOT / "examples" / "guides"
PAGES = [README, *sorted(GUIDES.glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_COMMAND = "lazy-orbax "
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the page's file.
        line: the line of the page, from 0, on which the code begins.
        language: what follows the fence.
        code: the lines between the fences.
        not_run: why no test runs it, or `None`.
    """

    page: pathlib.Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def compiled(self) -> Any:
        """Returns the code object, whose line numbers are those of the page."""
        return compile("\n" * self.line + self.code, str(self.page), "exec")


def name_of(page: pathlib.Path) -> str:
    """Returns what a page is called in the names of tests."""
    return page.stem


def blocks(page: pathlib.Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    found, fence, not_run, lines = [], None, None, page.read_text().splitlines()
    for number, line in enumerate(lines):
        if fence is None and (match := _FENCE.match(line)):
            fence = (number + 1, match.group(1))
        elif fence is not None and line == "```":
            begin, language = fence
            code = "\n".join(lines[begin:number]) + "\n"
            found.append(Block(page, begin, language, code, not_run))
            fence = not_run = None
        elif fence is None and line.strip():
            match = _NOT_RUN.match(line)
            not_run = match.group(1) if match else None
    assert fence is None, f"{page.name}: the block at line {fence[0]} does not end"
    return found


def prose(page: pathlib.Path) -> str:
    """Returns a page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: pathlib.Path) -> list[str]:
    """Returns the targets of a page's links, but for those that lead out of the repository."""
    return [link for link in _LINK.findall(prose(page)) if "://" not in link]


def anchors(page: pathlib.Path) -> set[str]:
    """Returns the names under which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(page: pathlib.Path) -> dict[str, Any]:
    """Runs the code of a page in the working directory. Returns the names that it defined."""
    names: dict[str, Any] = {"__name__": "page"}
    first = blocks(GUIDES / "quickstart.md")[0]
    here = [block for block in blocks(page) if block.not_run is None and block != first]
    for block in [first, *here]:
        if block.language == "python":
            exec(block.compiled(), names)
        elif block.language == "sh":
            for line in block.code.splitlines():
                if line.startswith(_COMMAND):
                    assert main(shlex.split(line, comments=True)[1:]) == 0, f"{block}: {line}"
    return names
