"""How many requests a restore takes, beside those of stock Orbax, and which at once."""

from __future__ import annotations

import collections
import re

import pytest
from gcs.proxy import Fault

N_LEAVES = 40
FORMATS = {
    "ocdbt": {},
    "ocdbt-zarr3": {"use_zarr3": True},
    "zstd": {"use_compression": True},
    "zarr": {"use_ocdbt": False},
    "zarr3-zstd": {"use_ocdbt": False, "use_zarr3": True, "use_compression": True},
}
# What says how and where arrays are stored, and what was saved; not what is stored of them.
SMALL = r"read \S*/default/(?!ocdbt.process_|leaf_)"
CHUNKS = r"read \S*/default/ocdbt.process_"


def requests_of(proxy, job):
    """Restores a step. Returns the requests that it took, as lines."""
    before = len(proxy.lines)
    assert job.do("wrong_leaves", 1, N_LEAVES) == []
    return proxy.lines[before:]


@pytest.fixture
def job(start):
    return start()


# Of the others, nightly.
QUICK = ("ocdbt", "zarr")


@pytest.mark.parametrize(
    "form", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FORMATS]
)
def test_no_more_than_stock_of_what_we_saved(job, proxy, root, form, tell):
    job.do("open", root, **FORMATS[form])
    job.do("save_leaves", 1, N_LEAVES)
    ours = requests_of(proxy, job)
    job.do("open", root, stock=True)
    stock = requests_of(proxy, job)
    tell("Requests of a restore from gs://", f"{form}, ours", str(len(ours)), str(len(stock)))
    assert len(ours) <= len(stock)


def test_no_more_than_stock_of_what_stock_saved(job, proxy, root, tell):
    job.do("open", root, stock=True)
    job.do("save_leaves", 1, N_LEAVES)
    stock = requests_of(proxy, job)
    job.do("open", root)
    ours = requests_of(proxy, job)
    tell("Requests of a restore from gs://", "of stock", str(len(ours)), str(len(stock)))
    assert len(ours) <= len(stock)
    # One chunk was one request, when TensorStore asked for each.
    assert len([line for line in ours if "ocdbt.process_" in line]) < N_LEAVES


@pytest.mark.parametrize("form", ["ocdbt", "zarr"])
def test_no_small_file_is_read_twice(job, proxy, root, form):
    job.do("open", root, **FORMATS[form])
    job.do("save_leaves", 1, N_LEAVES)
    read = collections.Counter(line for line in requests_of(proxy, job) if re.match(SMALL, line))
    assert f"read {root.split('/', 3)[3]}/1/default/_METADATA" in read
    assert set(read.values()) == {1}


@pytest.mark.parametrize(
    ("form", "kind", "least"), [("ocdbt", SMALL, 6), ("zarr", SMALL, 5), ("ocdbt", CHUNKS, 2)]
)
def test_what_is_alike_is_one_round_trip(job, proxy, root, form, kind, least):
    job.do("open", root, **FORMATS[form])
    job.do("save_leaves", 1, N_LEAVES)
    n_alike = sum(bool(re.match(kind, line)) for line in requests_of(proxy, job))
    assert n_alike >= least
    # Each is held back until all of them are asked for.
    held = proxy.add(Fault(kind, "late"))
    job.begin("wrong_leaves", 1, N_LEAVES)
    held.await_requests(n_alike)
    assert held.met == n_alike
    proxy.clear()
    assert job.end().result == []
