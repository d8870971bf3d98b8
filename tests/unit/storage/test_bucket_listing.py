"""A listing of a bucket: what it tells, and for how long epath knows of it."""

import fsspec
import pytest

from lazy_orbax.storage import bucket_listing

ADDRESS = "gs://bucket/run/1/default"
FOUND = {
    "_METADATA": 7,
    "d/one": 10,
    "d/": 0,
    "a/b/.zarray": 3,
}


class System:
    """As gcsfs: what it found, it knows from then on."""

    def __init__(self, found):
        self.dircache = {"bucket/run/1": ["known before"], "bucket/run/1/default/d": ["too"]}
        self._found = found

    def find(self, path, *, detail):
        assert detail
        found = {f"{path}/{name}": {"size": size} for name, size in self._found.items()}
        for folder in ("", "/d", "/a", "/a/b"):
            self.dircache[f"{path}{folder}"] = list(found)
        return found


@pytest.fixture
def system(monkeypatch):
    made = System(FOUND)
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: made)
    return made


@pytest.mark.parametrize("address", [ADDRESS, f"{ADDRESS}/"])
def test_it_tells_the_size_of_every_object(system, address):
    with bucket_listing.listed(address) as sizes:
        assert sizes == {"_METADATA": 7, "d/one": 10, "a/b/.zarray": 3}


def test_what_was_told_is_forgotten_at_the_end(system):
    with pytest.raises(KeyError), bucket_listing.listed(ADDRESS):
        assert f"{'bucket/run/1/default'}/a/b" in system.dircache
        raise KeyError
    assert set(system.dircache) == {"bucket/run/1", "bucket/run/1/default/d"}


def test_where_nobody_lists_there_is_none(monkeypatch):
    def refuse(*_, **__):
        raise ImportError("gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    with bucket_listing.listed(ADDRESS) as sizes:
        assert sizes is None
