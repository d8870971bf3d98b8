"""The tree of an OCDBT database: every value is found, and each node is read once."""

import collections
import functools

import pytest
import tensorstore as ts

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.storage.places import LocalPlace, _Content
from lazy_orbax.trust import ocdbt_decode, ocdbt_nodes
from lazy_orbax.trust.files import ItemFiles, survey
from lazy_orbax.trust.ocdbt_nodes import Extent, contents, likely_nodes

SUFFIXES = ("/.zarray",)


def written(directory, n_leaves, **config):
    """Writes a database, and returns its values by key."""
    spec = {"driver": "ocdbt", "base": f"file://{directory}/", "config": config}
    values, transaction = {}, ts.Transaction()
    store = ts.KvStore.open(spec).result().with_transaction(transaction)
    for i in range(n_leaves):
        values[f"leaf{i:04}/.zarray"] = f"{i}".encode() * (1 + 500 * (i % 7 == 0))
        values[f"leaf{i:04}/0.0"] = bytes([i % 256]) * (10 if i % 3 else 3000 + i)
    for key, value in values.items():
        store[key] = value
    transaction.commit_sync()
    return values


class Counted(LocalPlace):
    """A directory that counts what of its files is read."""

    @functools.cached_property
    def kvstore(self):
        return Ranges(super().kvstore)


class Ranges:
    def __init__(self, store):
        self._store, self.read_ranges = store, collections.Counter()

    def read(self, name, byte_range):
        self.read_ranges[name, byte_range.start, byte_range.stop] += 1
        return self._store.read(name, byte_range=byte_range)


@pytest.mark.parametrize(
    ("config", "n_leaves", "least"),
    [({}, 10, 1), ({"max_decoded_node_bytes": 2000}, 1000, 20)],
    ids=["one node", "many levels"],
)
def test_every_value_is_found(tmp_path, config, n_leaves, least):
    values = written(tmp_path, n_leaves, **config)
    place = Counted(str(tmp_path), 300.0)
    found = contents(ItemFiles(place), SUFFIXES)
    assert found is not None
    described = {key: value for key, value in values.items() if key.endswith(SUFFIXES)}
    assert found.metadata == described
    assert found.values.keys() == values.keys() - described.keys()
    for key, where in found.values.items():
        if isinstance(where, Extent):
            content = (tmp_path / where.file).read_bytes()
            where = content[where.offset : where.offset + where.length]
        assert where == values[key]
    # The nodes, and the descriptions that are no part of them.
    read = place.kvstore.read_ranges
    assert set(read.values()) == {1}
    assert len(read) - len([d for d in described.values() if len(d) > 100]) >= least


def test_what_tensorstore_said_of_a_node_is_let_go(tmp_path, monkeypatch):
    written(tmp_path, 10)
    said = []

    def decoded(*args):
        said.append(ocdbt_decode.decoded(*args))
        return said[-1]

    monkeypatch.setattr(ocdbt_nodes, "decoded", decoded)
    found = contents(ItemFiles(LocalPlace(str(tmp_path), 300.0)), SUFFIXES)
    assert found is not None
    assert len(found.values) == 10
    assert [one["entries"] for one in said if "entries" in one] == [[]]


def test_where_there_is_no_database_there_is_nothing(tmp_path):
    assert contents(ItemFiles(LocalPlace(str(tmp_path), 300.0)), SUFFIXES) is None


def test_an_empty_database_has_nothing(tmp_path):
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    store["key"] = b"value"
    del store["key"]
    found = contents(ItemFiles(LocalPlace(str(tmp_path), 300.0)), SUFFIXES)
    assert found is not None
    assert (found.metadata, found.values, found.longest_value) == ({}, {}, ("", 0))


class FarAway(Counted):
    has_special_files = False


class Bucket(FarAway):
    """Where as much is read of a file as was listed of it."""

    def start_read(self, name, *, size, most_bytes):
        return _Content(self.kvstore.read(name, byte_range=slice(0, size)))


def read_ahead(directory):
    """Returns the files of a database of one node, which is being read; and where they are."""
    place = FarAway(str(directory), 300.0)
    files = ItemFiles(place, survey(place.directory))
    (node,) = likely_nodes(files)
    files.read_ahead([node], 2**20)
    return files, place, directory / node


def test_a_node_that_was_read_ahead_is_not_read_again(tmp_path):
    written(tmp_path, 10, max_inline_value_bytes=1024)
    files, place, _ = read_ahead(tmp_path)
    found = contents(files, SUFFIXES)
    assert not [name for name, _, _ in place.kvstore.read_ranges if name in found.nodes]
    there = LocalPlace(str(tmp_path), 300.0)
    assert found == contents(ItemFiles(there, survey(there.directory)), SUFFIXES)


def test_a_node_that_was_read_ahead_and_is_too_short_is_refused(tmp_path):
    written(tmp_path, 10)
    _, _, node = read_ahead(tmp_path)
    node.write_bytes(node.read_bytes()[:-1])
    files, _, _ = read_ahead(tmp_path)
    with pytest.raises(
        MalformedCheckpointError, match=rf"{node.name}: found no bytes \d+ to \d+ \(it has"
    ):
        contents(files, SUFFIXES)


def test_a_node_that_is_shorter_than_it_was_listed_is_refused(tmp_path):
    written(tmp_path, 10)
    place = Bucket(str(tmp_path), 300.0)
    files = ItemFiles(place, survey(place.directory))
    (node,) = likely_nodes(files)
    (tmp_path / node).write_bytes((tmp_path / node).read_bytes()[:-1])
    files.read_ahead([node], 2**20)
    with pytest.raises(MalformedCheckpointError, match=rf"{node}: found no bytes \d+ to \d+ \("):
        contents(files, SUFFIXES)


def test_what_may_not_be_nodes_alone_is_not_read_ahead(tmp_path, monkeypatch):
    written(tmp_path, 10)
    files, _, node = read_ahead(tmp_path)
    monkeypatch.setattr(ocdbt_nodes, "_MOST_LIKELY_BYTES", files.size(f"d/{node.name}") - 1)
    assert likely_nodes(files) == []
    monkeypatch.undo()
    for name in ("values", "more"):
        (node.parent / name).write_bytes(b"x")
    assert likely_nodes(ItemFiles(files.place, survey(files.place.directory))) == []
    assert likely_nodes(ItemFiles(FarAway(str(tmp_path / "nowhere"), 300.0), {})) == []
