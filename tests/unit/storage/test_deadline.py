"""Addresses, retries and deadlines of object stores, without one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import types

import jax
import numpy as np
import pytest
import tensorstore as ts
from equipment.trees import on_mesh
from etils import epath

import lazy_orbax
from lazy_orbax.errors import OptionError
from lazy_orbax.save import item_stores, writer
from lazy_orbax.storage import deadline as deadlines
from lazy_orbax.storage import places


def seconds(text):
    return float(text.removesuffix("ms")) / 1000


@pytest.mark.parametrize("timeout_s", [1, 6.0, 60, 300.0, 3600])
def test_tensorstore_gives_up_before_the_deadline(timeout_s):
    spec = places.place_of("gs://bucket/run/1", timeout_s).context_spec()
    retries = spec["gcs_request_retries"]
    ts.Context(spec)  # It knows them all.
    first_s, longest_s = seconds(retries["initial_delay"]), seconds(retries["max_delay"])
    # TensorStore doubles the delay, and adds up to the first one at random.
    delays_s = [
        min(first_s * 2**i, longest_s) + min(first_s, 1) for i in range(retries["max_retries"])
    ]
    assert timeout_s / 3 < sum(delays_s) < timeout_s * 0.7
    assert retries["max_retries"] >= 5


def test_nothing_is_said_of_local_directories():
    assert places.place_of("/data/run", 300).context_spec() == {}
    assert places.scheme_of("/data/run") == ""


@pytest.mark.parametrize(
    ("directory", "wanted"),
    [
        ("/data/run/1", {"driver": "file", "path": "/data/run/1/d"}),
        ('/data/"odd" \\ name', {"driver": "file", "path": '/data/"odd" \\ name/d'}),
        (
            "gs://my-bucket/a/b c",
            {"driver": "gcs", "bucket": "my-bucket", "path": "a/b c/d"},
        ),
    ],
)
def test_a_directory_takes_the_place_of_its_stand_in(directory, wanted):
    of = places.place_of(directory).stand_in()
    bucket, _, path = of.removeprefix("gs://").partition("/")
    if of.startswith("gs://"):
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/d"}
    else:
        spec = {"driver": "file", "path": f"{of}/d"}
    assert places.place_of(directory).kvstore_spec_like(json.dumps(spec)) == wanted


def test_a_spec_for_another_kind_of_storage_is_refused():
    template = json.dumps({"driver": "file", "path": places.place_of("/data").stand_in()})
    with pytest.raises(OptionError, match="gs://bucket/run: Orbax told"):
        places.place_of("gs://bucket/run").kvstore_spec_like(template)


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_what_orbax_does_not_write_to_is_refused(mesh, tmp_path, monkeypatch, scheme):
    """Stock Orbax takes `s3://` for a local path, and without OCDBT writes to it."""
    monkeypatch.chdir(tmp_path)
    handler = lazy_orbax.LazyCheckpointHandler(use_ocdbt=False)
    args = lazy_orbax.args.LazySave({"w": on_mesh(np.ones((8, 4), np.float32), mesh, "a")})
    directory = epath.Path(f"{scheme}://bucket/run/1/default")
    with pytest.raises(OptionError) as raised:
        asyncio.run(handler.async_save(directory, args))
    assert f"does not write to {scheme}://" in str(raised.value)
    assert f"{scheme}://bucket/run/1/default" in str(raised.value)
    assert "Use gs:// or a local directory" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    jax.block_until_ready(args.item)


def test_a_write_that_is_never_acknowledged_is_waited_for_so_long():
    promise, future = ts.Promise.new()
    with pytest.raises(TimeoutError, match=r"acknowledged nothing for 0\.01 s"):
        deadlines.Deadline("gs://bucket/run", 0.01).result_of(future)
    promise.set_result(3)  # Too late.
    done, future = ts.Promise.new()
    done.set_result(3)
    assert deadlines.Deadline("gs://bucket/run", 0.01).result_of(future) == 3
    assert deadlines.Deadline("/data", 0.01).result_of(future) == 3


def test_a_merge_that_hangs_is_left_alone():
    go_on, ended = threading.Event(), threading.Event()

    def hang():
        assert go_on.wait(30)
        ended.set()

    with pytest.raises(TimeoutError, match="storage_timeout_s"):
        deadlines.Deadline("gs://bucket/run", 0.01).run(hang, "lazy_orbax-merge")
    go_on.set()
    assert ended.wait(30)


def test_a_merge_that_fails_is_told_of():
    def fail():
        raise ValueError("no luck")

    def work():
        pass

    deadline = deadlines.Deadline("gs://bucket/run", 30)
    deadline.run(work, "lazy_orbax-merge")
    with pytest.raises(ValueError, match="no luck"):
        deadline.run(fail, "lazy_orbax-merge")


def failed_save(directory, timeout_s=0.01):
    """Begins a save and fails it. Returns what TensorStore still has to do for it."""
    promise, future = ts.Promise.new()
    deadline = deadlines.Deadline(directory, timeout_s)
    deadline.begin()
    with pytest.raises(TimeoutError):
        deadline.result_of(future)
    deadline.end([future])
    return promise


def test_a_save_to_where_a_failed_one_may_still_write_is_refused():
    promise = failed_save("gs://bucket/late/1/default.orbax-checkpoint-tmp-3")
    with pytest.raises(TimeoutError, match="earlier save to this place.*Save another step"):
        deadlines.Deadline("gs://bucket/late/1/default", 0.01).begin()
    deadlines.Deadline("gs://bucket/late/2/default", 0.01).begin()
    promise.set_result(None)
    for may_hold_late_writes in (True, False):
        again = deadlines.Deadline("gs://bucket/late/1/default", 0.01)
        assert again.begin() == may_hold_late_writes
        again.end([])


def test_a_save_to_where_a_failed_one_may_still_write_waits():
    directory = "gs://bucket/late/3/default"
    asked = threading.Event()

    class Late(concurrent.futures.Future):
        def exception(self, timeout=None):
            asked.set()
            return super().exception(timeout)

    deadline, late = deadlines.Deadline(directory, 30), Late()
    assert not deadline.begin()
    deadline.end([late])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(deadlines.Deadline(directory, 30).begin)
        assert asked.wait(30)
        assert not waiting.done()
        late.set_result(None)
        assert waiting.result(30)


def test_a_save_waits_for_the_merge_of_a_failed_one():
    directory = "gs://bucket/late/4/default"
    go_on = threading.Event()

    def hang():
        assert go_on.wait(30)

    with pytest.raises(TimeoutError):
        deadlines.Deadline(directory, 0.01).run(hang, "lazy_orbax-merge")
    with pytest.raises(TimeoutError, match="earlier save"):
        deadlines.Deadline(directory, 0.01).begin()
    go_on.set()
    deadlines.Deadline(directory, 30).begin()


def test_what_has_ended_is_forgotten():
    outstanding = deadlines.Outstanding()
    for i in range(100):
        promise, future = ts.Promise.new()
        assert not outstanding.enter(f"gs://bucket/{i}", future, 0)
        promise.set_result(None)
    assert len(outstanding._futures) == 1


def test_a_writer_that_cannot_open_its_stores_holds_up_nobody(monkeypatch):
    def fail(self, spec):
        raise ValueError("no luck")

    monkeypatch.setattr(item_stores.ItemStores, "_open", fail)
    digests = types.SimpleNamespace(process=0, processes=(0,))
    format_ = types.SimpleNamespace(is_primary=True, directory="", kvstores=[], digests=digests)
    for _ in range(2):
        with pytest.raises(ValueError, match="no luck"):
            writer.Writer(None, format_, "gs://bucket/late/5/default", timeout_s=1)


def test_a_failed_save_to_a_local_directory_waits_for_its_writes():
    promise, future = ts.Promise.new()
    deadline = deadlines.Deadline("/data/run/1/default", 30)
    deadline.begin()
    threading.Timer(0.05, promise.set_result, (None,)).start()
    deadline.end([future])
    assert future.done()
    assert deadlines.is_quiet("/data/run/1/default")


def test_a_local_directory_is_not_quiet_while_a_write_to_it_hangs():
    promise, future = ts.Promise.new()
    deadline = deadlines.Deadline("/data/run/2/default", 0.01)
    deadline.begin()
    with pytest.raises(TimeoutError, match="acknowledged nothing for 0.01 s"):
        deadline.result_of(future)
    deadline.end([future])
    assert not deadlines.is_quiet("/data/run/2/default")
    promise.set_result(None)
    assert deadlines.is_quiet("/data/run/2/default")


def test_a_piece_that_grows_is_waited_for(tmp_path):
    """One large piece may take longer than the deadline, as long as something is written."""
    promise, future = ts.Promise.new()
    deadline = deadlines.Deadline(str(tmp_path), 0.05)
    looks = []

    def grow():
        looks.append((tmp_path / "piece").write_bytes(b"x" * len(looks)))
        if len(looks) < 5:
            return True
        promise.set_result(None)
        return True

    looked = deadline._writes_on
    deadline._writes_on = lambda: grow() and looked()
    assert deadline.result_of(future) is None
    assert len(looks) == 5
