"""What tests of what is to be seen share."""

from __future__ import annotations

import pathlib

import pytest
from equipment import runs as equipment


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with one run of each kind. Nobody may change them."""
    root = tmp_path_factory.mktemp("runs")
    equipment.make(root)
    return root
