"""What dies: a process that forks others, and the step that they find."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator

import pytest
from faults import crashes


@pytest.fixture(scope="session")
def interposer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The library that sees the calls that change a file system."""
    library = crashes.build(tmp_path_factory.mktemp("fscalls"))
    if library is None:
        pytest.skip("there is no C compiler for the interposer")
    return library


@pytest.fixture(scope="module")
def zygote(interposer: pathlib.Path) -> Iterator[crashes.Zygote]:
    """Forks processes that die while they save."""
    zygote = crashes.Zygote(interposer)
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def other(
    interposer: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[crashes.Zygote]:
    """Forks processes of another machine."""
    library = shutil.copy(interposer, tmp_path_factory.mktemp("other") / "fscalls.so")
    zygote = crashes.Zygote(pathlib.Path(library))
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def first_step(zygote: crashes.Zygote, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with one step."""
    root = tmp_path_factory.mktemp("first") / "run"
    zygote.save(root, 1)
    return root


@pytest.fixture(scope="module")
def first_of_linked(
    zygote: crashes.Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, pathlib.Path]:
    """Runs with one step, to whose files the next one links: in a database or not."""
    roots = {flag: tmp_path_factory.mktemp("linked") / "run" for flag in (False, True)}
    for in_database, root in roots.items():
        zygote.save(root, 1, linked=True, in_database=in_database)
    return roots
