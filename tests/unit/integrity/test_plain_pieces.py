"""What `verify` reads without opening an array, and what it leaves to who opens them."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.inspection.leaves import ItemLeaves
from lazy_orbax.integrity.stored_arrays import StoredArrays

KINDS = [
    {"use_ocdbt": ocdbt, "use_zarr3": zarr3, "use_compression": compressed}
    for ocdbt in (True, False)
    for zarr3 in (True, False)
    for compressed in (True, False)
]
NAMES = {"use_ocdbt": "ocdbt", "use_zarr3": "zarr3", "use_compression": "zstd"}


@pytest.fixture
def opened(monkeypatch):
    """Names of the leaves whose arrays are opened."""
    names, stock = [], StoredArrays.open

    def noted(self, name):
        names.append(name)
        return stock(self, name)

    monkeypatch.setattr(StoredArrays, "open", noted)
    return names


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(NAMES[k] for k, on in kind.items() if on))
def item(request, tmp_path, mesh):
    """An item of short and long, split and encoded leaves."""
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    tree = {
        "short": np.arange(4, dtype=np.int16),
        "long": jax.random.normal(jax.random.key(0), (512, 64)),
        "half": jax.random.normal(jax.random.key(1), (33, 5)).astype(jax.numpy.bfloat16),
        "split": jax.device_put(np.arange(4096.0, dtype=np.float32).reshape(64, 64), split),
        "flags": np.array([True, False, True]),
        "one": np.float64(2.5),
        "step": 7,
        "text": "Grüße",
    }
    with ocp.Checkpointer(lazy_orbax.pytree_handler(**request.param)) as checkpointer:
        checkpointer.save(tmp_path / "item", args=ocp.args.PyTreeSave(tree))
    return tmp_path / "item", request.param["use_compression"]


def test_what_is_plain_is_read_without_opening_it(item, opened):
    directory, is_compressed = item
    told = []
    report = lazy_orbax.verify(directory, on_progress=lambda *n_bytes: told.append(n_bytes))
    assert report.is_whole
    assert set(opened) <= {"flags"} or is_compressed  # Not every byte is a boolean.
    assert told[-1][0] == told[-1][1] > 0


def place_of(directory, leaf):
    """The file in which the only chunk of a leaf is, where it begins, and its bytes."""
    values = ItemLeaves(str(directory)).contents.values
    (extent,) = (value for path, value in values.items() if path.startswith(f"{leaf}/"))
    return directory / extent.file, extent.offset, extent.length


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def test_every_byte_counts(item):
    directory, _ = item
    file, start, length = place_of(directory, "long")
    for position in np.linspace(start, start + length - 1, 12, dtype=int).tolist():
        flip(file, position)
        (problem,) = lazy_orbax.verify(directory).all_problems
        assert problem.leaf == "long", position
        flip(file, position)
    assert lazy_orbax.verify(directory).is_whole


def test_it_says_where_in_the_leaf_and_in_which_file(item):
    directory, is_compressed = item
    file, start, length = place_of(directory, "long")
    flip(file, start + length // 2)
    (problem,) = lazy_orbax.verify(directory).all_problems
    assert (problem.leaf, problem.index) == ("long", "[0:512, 0:64]")
    assert problem.file.startswith(str(file.relative_to(directory)))
    assert is_compressed or problem.what.startswith("its digest is")


def test_a_file_that_is_cut_short_is_not_whole(item):
    directory, _ = item
    file, start, length = place_of(directory, "long")
    file.write_bytes(file.read_bytes()[: start + length - 1])
    assert not lazy_orbax.verify(directory).is_whole
