"""Programs that use Orbax, unmodified: `install()` makes them lazy, and changes nothing else."""

import re

import jax
import numpy as np
import pytest
from equipment.clients import CLIENTS

import lazy_orbax

# What clients have Orbax or JAX say, which is not about us.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
]


def kinds_of_files(directory):
    """Which files there are, without ours, and without names that are random or count chunks."""
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    ours = {name for name in files if "lazy_orbax" in name}
    return {re.sub(r"/d/[^/]+$", "/d/*", name) for name in files - ours}, ours


def run(client, directory):
    """Compares what a client restored with what it saved. Returns all of it."""
    directory.mkdir()
    pairs = list(client(directory))
    assert pairs
    for saved, restored in pairs:
        jax.tree.map(np.testing.assert_array_equal, saved, restored)
    return pairs


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_a_client_saves_lazily_by_install_alone(tmp_path, client):
    stock = run(client, tmp_path / "stock")
    with lazy_orbax.install():
        lazy = run(client, tmp_path / "lazy")
        assert lazy_orbax.status().n_stock_saves == 0
    files, ours = kinds_of_files(tmp_path / "lazy")
    assert ours
    assert (files, set()) == kinds_of_files(tmp_path / "stock")
    assert jax.tree.structure(stock) == jax.tree.structure(lazy)
    assert all(lazy_orbax.verify(step).ok for step in sorted((tmp_path / "lazy").iterdir()))
