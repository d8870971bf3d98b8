"""The benchmark of restores runs, compares bits, and its tables are right. No speed is asserted."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import jax
import pytest

from benchmarks import record, report
from benchmarks.restore import child, page_cache, plain_read, slow_bucket, states, table
from benchmarks.restore.cases import (
    CASES,
    LAZY,
    PEERS,
    RAW,
    STOCK,
    TARGETS,
    WORKLOADS,
    Reading,
    Writing,
    rows_of,
)
from benchmarks.restore.slow_bucket import Request
from benchmarks.restore.turns import writers_of

ROOT = pathlib.Path(__file__).parents[2]
EACH = {"first", "first_cpu", "first_cached", "second", "second_cpu", "second_cached", "load"}
EACH |= {"peak_above", "peak", "peak_by_kernel", "state"}
FILES = {"from_storage", "asked", "read_calls"}
BUCKET = {"requests", "round_trips", "answered", "kinds"}


# A whole run, in processes as a user starts them.


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[dict], str]:
    """The records and what was printed, at a size that proves nothing but that it runs."""
    directory = tmp_path_factory.mktemp("restore")
    out = directory / "out.jsonl"
    flags = ("--size", "tiny", "--cases", "small,gs", "--peers", "lazy,raw_1,raw_direct_4")
    more = ("--repeats", "1", "--latency-ms", "5", "--directory", directory, "--json", out)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.restore", *map(str, (*flags, *more))],
        cwd=ROOT,
        # The benchmark chooses its own devices.
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in directory.iterdir()] == [out.name], "checkpoints are left behind"
    return list(record.read(out)), done.stdout


def test_every_peer_has_every_metric(measured):
    found = {}
    for each in measured[0]:
        found.setdefault((each["workload"], each["peer"]), set()).add(each["metric"])
    assert found["small", "lazy"] == EACH | FILES | {
        m for m in found["small", "lazy"] if m.startswith("report")
    }
    assert found["gs/5ms", "lazy"] >= EACH | BUCKET
    assert found["small", "raw_1"] == EACH | FILES
    assert found.get(("small", "raw_direct_4"), EACH | FILES) == EACH | FILES
    assert {row for row, _ in found} == {"small", "gs/5ms"}


def test_what_was_measured_makes_sense(measured):
    found = {key[1:]: f["median"] for key, f in table.by_key(measured[0]).items()}
    state = WORKLOADS["many"].leaves["tiny"] * 64 * 64 * 4
    assert found["small", "lazy", "state"] == state
    for peer in ("lazy", "raw_1"):
        assert found["small", peer, "asked"] >= state
        assert found["small", peer, "first"] > 0
    assert 0 < found["gs/5ms", "lazy", "round_trips"] <= found["gs/5ms", "lazy", "requests"]
    # Each waits at least as long as it was told to.
    assert found["gs/5ms", "lazy", "first"] >= 0.005 * found["gs/5ms", "lazy", "round_trips"]
    assert found["gs/5ms", "lazy", "answered"] >= state


def test_the_tables_are_printed_with_the_machine(measured):
    records, printed = measured
    assert table.section(table.by_key(records)) in printed
    assert records[0]["hardware"]["cpu"] in printed
    assert f"jax {records[0]['versions']['jax']}" in printed
    assert "| small | " in printed
    assert "| gs/5ms | " in printed


# What each process does, in this one.


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Writing:
    directory = tmp_path_factory.mktemp("written")
    writing = Writing(
        workload="many",
        size="tiny",
        digests=str(directory / "digests"),
        paths={peer: str(directory / peer) for peer in ("stock_default", "lazy")},
    )
    assert child.obey(dataclasses.asdict(writing)) is None
    return writing


def reading_of(writing, *, peer="lazy", writer="lazy", target="same", dtype="float32", restores=1):
    return Reading(
        workload=writing.workload,
        size=writing.size,
        digests=writing.digests,
        path=writing.paths[writer],
        peer=peer,
        target=target,
        dtype=dtype,
        restores=restores,
    )


@pytest.mark.parametrize(
    ("peer", "target", "dtype"),
    [
        *(("lazy", target, "float32") for target in TARGETS),
        ("lazy", "grid", "bfloat16"),
        ("stock_default", "same", "float32"),
        ("stock_default", "axis_1", "bfloat16"),
    ],
)
def test_every_target_is_restored_and_compared(written, peer, target, dtype):
    told = reading_of(written, peer=peer, writer=peer, target=target, dtype=dtype)
    [said] = child.obey(dataclasses.asdict(told))
    assert said["ended_s"] > said["began_s"]
    assert said["cpu_s"] > 0


@pytest.mark.parametrize("peer", ["lazy", "lazy_unverified", "stock_of_lazy"])
def test_who_reads_what_another_wrote(written, peer):
    writer = CASES["stock_zstd"].writer if peer == "lazy" else "lazy"
    told = reading_of(written, peer=peer, writer=writer, restores=2)
    assert len(child.obey(dataclasses.asdict(told))) == 2


def test_other_bits_are_an_error(written, tmp_path):
    digests = json.loads(pathlib.Path(written.digests).read_text())
    digests["float32"][3] = digests["float32"][2]
    spoilt = tmp_path / "digests"
    spoilt.write_text(json.dumps(digests))
    told = dataclasses.replace(reading_of(written), digests=str(spoilt))
    with pytest.raises(ValueError, match="1 leaves were not restored as saved: .*leaf_00003"):
        child.obey(dataclasses.asdict(told))


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Writing:
    directory = tmp_path_factory.mktemp("scanned")
    paths = {"lazy": str(directory / "lazy")}
    digests = str(directory / "digests")
    writing = Writing(workload="scanned", size="tiny", digests=digests, paths=paths)
    assert child.obey(dataclasses.asdict(writing)) is None
    return writing


@pytest.mark.parametrize("peer", ["lazy", "lazy_transformed"])
def test_stacked_layers_are_restored_and_taken_apart(scanned, peer):
    [said] = child.obey(dataclasses.asdict(reading_of(scanned, peer=peer)))
    assert said["report"]["n_leaves"] == (5 if peer == "lazy" else 5 * 24)


@pytest.mark.parametrize(("dtype", "leaf"), [("float32", 0), ("bfloat16", 1), ("float32", 2)])
def test_other_bits_of_single_layers_are_an_error(scanned, tmp_path, dtype, leaf):
    digests = json.loads(pathlib.Path(scanned.digests).read_text())
    digests[dtype][leaf] = digests[dtype][leaf - 1]
    spoilt = tmp_path / "digests"
    spoilt.write_text(json.dumps(digests))
    told = dataclasses.replace(reading_of(scanned, peer="lazy_transformed"), digests=str(spoilt))
    with pytest.raises(ValueError, match=f"1 leaves were not restored .*weight_0000{leaf}"):
        child.obey(dataclasses.asdict(told))


@pytest.fixture
def saved(written) -> tuple[dict[str, jax.Array], states.Digests]:
    return states.build(written)


def test_nothing_is_wrong_with_what_was_saved(written, saved):
    state, digests = saved
    assert states.wrong(reading_of(written), state, digests) == []


def put_elsewhere(leaf):
    return jax.device_put(leaf, states.sharding_of("axis_1"))


def cast(leaf):
    return leaf.astype("bfloat16")


def differ_between_replicas(leaf):
    sharding = states.sharding_of("replicated")
    parts = [jax.device_put(leaf + i, device) for i, device in enumerate(jax.devices())]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


@pytest.mark.parametrize("change", [put_elsewhere, cast, differ_between_replicas])
def test_what_is_wrong_is_named(written, saved, change):
    state, digests = saved
    target = "replicated" if change is differ_between_replicas else "same"
    restored = {name: jax.device_put(x, states.sharding_of(target)) for name, x in state.items()}
    restored["leaf_00001"] = change(state["leaf_00001"])
    assert states.wrong(reading_of(written, target=target), restored, digests) == ["leaf_00001"]


def test_a_missing_leaf_is_wrong(written, saved):
    state, digests = saved
    del state["leaf_00001"]
    assert states.wrong(reading_of(written), state, digests)


def test_memory_that_replicas_share_counts_once(saved):
    state, _ = saved
    n_bytes = sum(leaf.nbytes for leaf in state.values())
    assert states.bytes_of(state) == n_bytes
    assert states.bytes_of({**state, "again": state["leaf_00001"]}) == n_bytes


@pytest.mark.parametrize("peer", RAW)
def test_a_plain_read_has_every_byte(tmp_path, peer):
    contents = [os.urandom(n) for n in (0, 1, 4096, 9 * 2**20 + 5)]
    files = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(files, contents):
        path.write_bytes(content)
    try:
        read = plain_read.reader(peer, files)
    except OSError:
        pytest.skip("no O_DIRECT here")
    with read() as memory:
        at = 0
        for content in contents:
            assert memory[at : at + len(content)] == content
            at += -(-len(content) // 4096) * 4096


def test_files_leave_the_page_cache(tmp_path):
    if record.file_system_of(tmp_path) in ("tmpfs", "ramfs", "overlay"):
        pytest.skip("these files are nowhere else")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**20))
    os.sync()
    path.read_bytes()
    assert page_cache.resident_bytes([path]) == 2**20
    assert page_cache.evict([path]) == page_cache.resident_bytes([path]) == 0


# The bucket.


def test_the_bucket_waits_and_counts():
    with slow_bucket.opened() as bucket:
        host = urllib.parse.urlsplit(bucket.url)
        name = f"http://{host.netloc}/upload/storage/v1/b/benchmark/o?uploadType=media&name=a/b"
        content = os.urandom(1000)
        before = len(bucket.requests)
        urllib.request.urlopen(urllib.request.Request(name, content)).close()
        bucket.latency_s = 0.03
        url = f"{bucket.url}/storage/v1/b/benchmark/o/a%2Fb"
        with urllib.request.urlopen(f"{url}?alt=media") as answer:
            assert answer.read() == content
        urllib.request.urlopen(url).close()
        urllib.request.urlopen(f"{bucket.url}/storage/v1/b/benchmark/o?prefix=a").close()
        requests = bucket.requests[before:]
    assert [request.kind for request in requests] == ["post", "read", "look", "list"]
    assert requests[1].n_bytes == len(content)
    assert all(request.ended_s - request.began_s >= 0.03 for request in requests[1:])
    assert bucket.between(requests[1].began_s, requests[2].began_s) == requests[1:3]
    assert slow_bucket.round_trips(requests) == 4


@pytest.mark.parametrize(
    ("spans", "count"),
    [
        ([], 0),
        ([(0, 1)], 1),
        ([(0, 1), (0, 1), (0, 1)], 1),
        ([(0, 1), (1, 2), (2, 3)], 3),
        ([(0, 3), (0, 1), (1, 2), (1, 2)], 2),
        ([(2, 3), (0, 1)], 2),
    ],
)
def test_round_trips_are_requests_without_an_overlap(spans, count):
    assert slow_bucket.round_trips(Request("read", a, b, 0) for a, b in spans) == count


# The cases, and the tables.


def test_every_case_restores_by_stock_and_by_us():
    for row in rows_of(tuple(CASES), ()):
        assert {"stock_default", "lazy"} <= set(row.peers)
        assert set(row.peers) <= set(PEERS)


def test_everybody_reads_what_somebody_writes():
    written = writers_of(rows_of(tuple(CASES), PEERS))
    assert set(written) == {case.workload for case in CASES.values()}
    assert all({"stock_default", "lazy"} <= set(writers) for writers in written.values())
    assert writers_of(rows_of(("stock_zstd",), ())) == {"many": ["stock_default"]}
    assert writers_of(rows_of(("small",), (*RAW, *LAZY))) == {"many": ["lazy"]}
    assert rows_of(("gs",), RAW) == []


def records_of(row, metric, medians, unit="s"):
    """Records of one metric, by peer, as from one repeat."""
    context = {
        "time": "now",
        "size": "full",
        "versions": {"jax": "1"},
        "hardware": {
            "cpu": "a cpu",
            "cores": 2,
            "memory_bytes": 1,
            "file_system": "ext4",
            "accelerator": "cpu",
        },
    }
    samples = [
        record.Sample(
            part="restore", workload=row, peer=peer, metric=metric, value=value, unit=unit
        )
        for peer, value in medians.items()
    ]
    return table.by_key(record.as_records(samples, context))


@pytest.mark.parametrize(
    ("row", "metric", "medians", "verdicts"),
    [
        ("small", "first", {"lazy": 1, "stock_default": 8, "raw_4": 1}, ["met", "met"]),
        ("small", "first", {"lazy": 1, "stock_default": 7.9, "raw_4": 0.5}, ["missed", "missed"]),
        ("small", "first_cpu", {"lazy": 1, "stock_default": 10}, ["met"]),
        ("large", "first", {"lazy": 1, "stock_default": 2, "raw_1": 0.9, "raw_4": 1}, "mixed"),
        ("resharded/grid", "first", {"lazy": 1, "stock_default": 6}, ["met"]),
        ("resharded/grid", "first", {"lazy": 1}, []),
        ("resharded_large/grid", "first", dict(zip(("lazy", *STOCK), (1, 2, 0.9))), ["missed"]),
        ("gs/50ms", "round_trips", {"lazy": 8, "stock_default": 4}, ["met"]),
        ("gs/50ms", "round_trips", {"lazy": 9}, ["missed"]),
        ("small", "peak_above", {"lazy": 65 * 2**20}, ["missed"]),
        ("many5k", "peak_above", {"lazy": 1, "stock_default": 3}, ["met"]),
        ("small", "second", {"lazy": 1, "stock_default": 3}, []),
    ],
)
def test_goals_are_met_or_missed(row, metric, medians, verdicts):
    unit = "bytes" if metric == "peak_above" else "s"
    lines = table.goals.table(records_of(row, metric, medians, unit), "restore").splitlines()[2:]
    found = [line.split("|")[-2].strip(" *") for line in lines]
    assert found == (["met", "missed"] if verdicts == "mixed" else verdicts)


def test_a_table_has_medians_ranges_and_ratios():
    records = records_of("small", "first", {"lazy": 1.5, "stock_default": 3, "raw_4": 0.5})
    records["restore", "small", "lazy", "first"] |= {"min": 1, "max": 2}
    text = table.section(records)
    assert "| small | 3 s | 1.5 s (1 to 2) | 500 ms | 2.0x less | 3.00x |" in text
    assert "on a cpu, 2 cores" in text


def test_what_lazy_orbax_reports_is_shown():
    assert "**what lazy reports**" in table.section(
        records_of("small", "report_planned_s", {"lazy": 0.1})
    )


def test_the_report_has_a_section_for_restores(tmp_path):
    records = records_of("small", "first", {"lazy": 1, "stock_default": 3})
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "benchmarks" / "README.md", readme)
    report.write_into(readme, report.tables(records))
    assert "| small | 3 s | 1 s | 3.0x less |" in readme.read_text()
