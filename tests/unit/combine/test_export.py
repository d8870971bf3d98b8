"""`export`: names, shapes, dtypes and bits, as the library `safetensors` reads them."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import on_mesh, random_array
from etils import epath
from jax.sharding import Mesh
from safetensors import deserialize

import lazy_orbax
from lazy_orbax.cli.main import main
from lazy_orbax.errors import (
    CorruptCheckpointError,
    MalformedCheckpointError,
    OptionError,
    TransformError,
)
from lazy_orbax.inspect import clean
from lazy_orbax.plan.transforms.rules_as_json import map_of
from lazy_orbax.transforms import (
    TransformMap,
    cast,
    drop,
    fuse,
    pad_to,
    rename,
    scale,
    select,
    split,
    strip,
    transpose,
    unstack,
)

RNG = np.random.default_rng(18)
DTYPES = {
    **{f"F{n}": np.dtype(f"float{n}") for n in (16, 32, 64)},
    **{f"I{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"U{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def saved(directory, tree, *, stock=False, **keywords):
    handler = (ocp.PyTreeCheckpointHandler if stock else lazy_orbax.pytree_handler)(**keywords)
    ocp.Checkpointer(handler).save(epath.Path(directory), args=ocp.args.PyTreeSave(tree))
    return directory


def tensors_in(out):
    """What the library reads: NumPy arrays by name, from every file."""
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        for name, one in deserialize(path.read_bytes()):
            array = np.frombuffer(bytes(one["data"]), DTYPES[one["dtype"]]).reshape(one["shape"])
            assert found.setdefault(name, array) is array
    return found


def assert_tensors(out, wanted):
    found = tensors_in(out)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def left_in(directory):
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("stock", [False, True])
def test_every_dtype_comes_as_it_was_saved(tmp_path, stock):
    arrays = {f"d.{name}": random_array(RNG, (3, 5), dtype) for name, dtype in DTYPES.items()}
    arrays["d.point"] = np.array(2.5)
    tree = {"d": {name.removeprefix("d."): array for name, array in arrays.items()}}
    report = lazy_orbax.export(saved(tmp_path / "c", tree, stock=stock), tmp_path / "out")
    assert_tensors(tmp_path / "out", arrays)
    assert report.verified == (not stock)
    assert left_in(tmp_path / "out") == {"model.safetensors"}


FORMATS = [
    {},
    {"use_ocdbt": False, "use_zarr3": True},
    {"use_compression": False},
    {"use_ocdbt": False, "use_compression": False},
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rules_name_tensors_of_sharded_leaves_in_every_format(tmp_path, form):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    scanned = random_array(RNG, (4, 3, 6), np.float32)
    qkv, table = RNG.normal(size=(4, 12)).astype(np.float32), np.ones((10, 4), ml_dtypes.bfloat16)
    tree = {
        "params": {
            "scan": {"w": on_mesh(scanned, mesh, "a", None, "b")},
            "qkv": on_mesh(qkv, mesh, None, ("a", "b")),
            "table": table,
        },
        "mu": {"scan": {"w": scanned}},
        "note": "a string",
    }
    rules = [
        select(r"params\..*"),
        unstack(r"params\.scan\.w", "model.{layer}.w"),
        transpose(r"model\.\d\.w"),
        split(r"params\.qkv", ["q", "k", "v"], 1),
        fuse(["k", "v"], "kv", 1),
        scale("q", 0.5),
        rename(r"params\.table", "embed"),
        pad_to("embed", (12, None)),
        cast("kv", "bfloat16"),
    ]
    report = lazy_orbax.export(
        saved(tmp_path / "c", tree, **form), tmp_path / "out", map=TransformMap(rules)
    )
    assert_tensors(
        tmp_path / "out",
        {
            **{f"model.{i}.w": scanned[i].T for i in range(4)},
            "q": qkv[:, :4] * np.float32(0.5),
            "kv": qkv[:, 4:].astype(ml_dtypes.bfloat16),
            "embed": np.concatenate([table, np.zeros((2, 4), table.dtype)]),
        },
    )
    assert (report.dropped, report.left_out) == (("mu.scan.w",), ("note",))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("compressed", [False, True])
def test_float64_is_rounded_once(tmp_path, dtype, compressed):
    """A hair above a tie, which float32 would lose."""
    step = float(ml_dtypes.finfo(dtype).eps)
    values = np.array([[1 + step / 2 + 1e-12, 1 + step / 2 - 1e-12, -3.0]] * 300).T.copy()
    saved(tmp_path / "c", {"w": values}, use_compression=compressed)
    lazy_orbax.export(tmp_path / "c", tmp_path / "out", dtype=dtype)
    (content,) = (
        dict(one) for _, one in deserialize((tmp_path / "out" / "model.safetensors").read_bytes())
    )
    found = np.frombuffer(content["data"], ml_dtypes.finfo(dtype).dtype).reshape(3, 300)
    assert found[:, 0].astype(float).tolist() == [1 + step, 1, -3]


def test_a_dtype_is_for_floats_that_no_rule_casts(tmp_path):
    tree = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32), "n": np.arange(3)}
    rules = TransformMap([cast("b", "float16"), strip("n", [0])])
    saved(tmp_path / "c", tree)
    lazy_orbax.export(tmp_path / "c", tmp_path / "out", map=rules, dtype="bfloat16")
    wanted = {"a": tree["a"].astype(ml_dtypes.bfloat16), "b": tree["b"].astype(np.float16)}
    assert_tensors(tmp_path / "out", {**wanted, "n": tree["n"][:0]})


def test_no_dtype_takes_imaginary_parts_away(tmp_path):
    state = {"real": np.ones(3, np.float32), "complex": np.full(3, 1 + 2j, np.complex64)}
    step = saved(tmp_path / "step", state)
    lazy_orbax.export(step, tmp_path / "half", dtype=ml_dtypes.bfloat16)
    wanted = {**state, "real": state["real"].astype(ml_dtypes.bfloat16)}
    assert_tensors(tmp_path / "half", wanted)


def test_shards_hold_so_many_bytes_and_an_index_finds_them(tmp_path):
    tree = {f"w{i}": np.full(10 + 90 * (i == 2), i, np.float32) for i in range(5)}
    saved(tmp_path / "c", tree)
    report = lazy_orbax.export(tmp_path / "c", tmp_path / "out", max_shard_bytes=80)
    assert_tensors(tmp_path / "out", tree)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"] == {"total_size": 4 * 140}
    assert list(index["weight_map"].values()) == [names[i] for i in (0, 0, 1, 2, 2)]
    assert report.files == {name: (tmp_path / "out" / name).stat().st_size for name in names}


def test_memory_does_not_grow_with_the_state(tmp_path):
    """One stored chunk becomes many tensors, is transposed and cast, and is never held."""
    n_bytes = 2**26
    state = {"w": np.ones((64, 512, n_bytes // 2**17), np.float32)}
    saved(tmp_path / "c", state, use_compression=False)
    rules = TransformMap([unstack("w", "layer.{layer}"), transpose(r"layer\..*")])
    tracemalloc.start()
    try:
        lazy_orbax.export(tmp_path / "c", tmp_path / "out", map=rules, dtype="bfloat16")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < n_bytes / 2
    assert len(tensors_in(tmp_path / "out")) == 64


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path):
    saved(tmp_path / "c", {"a": np.ones(3), "b": np.ones(4)})
    planned = lazy_orbax.export(tmp_path / "c", tmp_path / "out", dry_run=True)
    assert left_in(tmp_path) == {"c"}
    assert "2 tensors, 56 B, 1 file would be written" in str(planned)
    report = lazy_orbax.export(tmp_path / "c", tmp_path / "out")
    assert dataclasses.replace(planned, dry_run=False, verified=True) == report


def test_of_a_run_the_newest_step_is_taken(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=lazy_orbax.standard_handler()) as m:
        for step in (1, 2):
            m.save(step, args=ocp.args.StandardSave({"w": np.full(3, step, np.float32)}))
    seen = []
    lazy_orbax.export(tmp_path / "run", tmp_path / "out", on_progress=lambda *n: seen.append(n))
    assert_tensors(tmp_path / "out", {"w": np.full(3, 2, np.float32)})
    assert seen == [(12, 12)]


# What goes wrong: one clear error, and nothing is left of it.


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    tree = {"w": np.ones((8, 4), np.float32), "small": np.ones(3, ml_dtypes.int4), "n": np.ones(2)}
    return saved(tmp_path_factory.mktemp("export") / "c", tree, use_ocdbt=False)


FINE = [drop("small")]
REFUSED = [
    ([], {}, TransformError, "leaf small: found int4, which the format does not have; cast() it"),
    ([drop("smal")], {}, TransformError, "it is about no leaf"),
    ([drop(".*")], {}, TransformError, "nothing to export"),
    ([*FINE, rename("n", "w")], {}, TransformError, "become w"),
    ([*FINE, rename("n", "__metadata__")], {}, TransformError, "wanted another; rename() it"),
    (FINE, {"dtype": "float33"}, TransformError, "'float33' is no dtype"),
    (FINE, {"max_shard_bytes": 0}, OptionError, "max_shard_bytes=0 must be"),
    (FINE, {"host_bytes": 1.5}, OptionError, "host_bytes=1.5 must be"),
]


@pytest.mark.parametrize(("rules", "keywords", "error", "message"), REFUSED)
def test_what_cannot_be_exported_is_named(step, tmp_path, rules, keywords, error, message):
    with pytest.raises(error) as caught:
        lazy_orbax.export(step, tmp_path / "out", map=TransformMap(rules), **keywords)
    assert message in str(caught.value)
    assert not left_in(tmp_path)


def test_where_nothing_can_be_written_is_named(step, tmp_path):
    (tmp_path / "there").mkdir()
    for out, message in (
        (tmp_path / "there", "is there already"),
        (tmp_path / "no" / "out", "is not a directory"),
        ("gs://bucket/out", "a local directory"),
        (3, "a local directory"),
    ):
        with pytest.raises(OptionError, match=message):
            lazy_orbax.export(step, out, map=TransformMap(FINE))
    with pytest.raises(OptionError, match="names of several"):
        lazy_orbax.export(step, tmp_path / "out", map=TransformMap([], sources=["a", "b"]))
    with pytest.raises(OptionError, match="holds no checkpoint"):
        lazy_orbax.export(tmp_path / "there", tmp_path / "out")


def test_a_source_that_is_not_what_was_saved_is_not_exported(step, tmp_path):
    shutil.copytree(step, tmp_path / "c")
    (chunk,) = [p for p in (tmp_path / "c" / "n").iterdir() if p.name[0] != "."]
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(CorruptCheckpointError, match="leaf n"):
        lazy_orbax.export(tmp_path / "c", tmp_path / "out", map=TransformMap(FINE))
    chunk.unlink()
    with pytest.raises(CorruptCheckpointError):
        lazy_orbax.export(tmp_path / "c", tmp_path / "out", map=TransformMap(FINE))
    shutil.rmtree(tmp_path / "c" / "lazy_orbax_digests")
    zarray = tmp_path / "c" / "w" / ".zarray"
    zarray.write_text(json.dumps({**json.loads(zarray.read_text()), "shape": [2**60, 4]}))
    with pytest.raises(MalformedCheckpointError):
        lazy_orbax.export(tmp_path / "c", tmp_path / "out", map=TransformMap(FINE))
    assert left_in(tmp_path) == {"c"}


def test_a_full_disk_is_said_before_a_byte_is_read(step, tmp_path, monkeypatch):
    def full(descriptor, offset, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        lazy_orbax.export(step, tmp_path / "out", map=TransformMap(FINE))
    assert caught.value.filename.endswith("model.safetensors")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OptionError, match="has 100 bytes left"):
        lazy_orbax.export(step, tmp_path / "out", map=TransformMap(FINE))
    assert not left_in(tmp_path)


def test_who_interrupts_it_leaves_nothing_and_who_kills_it_no_directory_of_that_name(
    step, tmp_path
):
    def interrupted(done_bytes, all_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lazy_orbax.export(step, tmp_path / "out", map=TransformMap(FINE), on_progress=interrupted)
    assert not left_in(tmp_path)
    code = """
import os, signal, sys
import lazy_orbax
from lazy_orbax.transforms import TransformMap, drop
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
lazy_orbax.export(*sys.argv[1:], map=TransformMap([drop("small")]), on_progress=kill)
"""
    run = [sys.executable, "-c", code, str(step), str(tmp_path / "out")]
    found = subprocess.run(run, capture_output=True, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr
    (left,) = left_in(tmp_path)
    assert left.startswith(".out.exporting-")
    (tmp_path / ".out.exporting-of-somebody").mkdir()
    (told,) = clean(tmp_path, quiet_s=0).directories
    assert (told.path, told.kept) == (str(tmp_path / left), None)
    assert told.n_bytes
    (told,) = clean(tmp_path).directories
    assert "just now" in told.kept
    seen = []
    rules = TransformMap(FINE)
    lazy_orbax.export(
        step, tmp_path / "out", map=rules, on_progress=lambda *_: seen.append(at_work(tmp_path))
    )
    assert {kept for _, kept in seen} == {"an export is at it"}
    assert left not in {name for name, _ in seen}
    assert left_in(tmp_path) == {"out", ".out.exporting-of-somebody"}


def at_work(directory):
    """Returns the one hidden directory of an export that runs, and why it is not removed."""
    (told,) = clean(directory, dry_run=False, quiet_s=0).directories
    return os.path.basename(told.path), told.kept


def test_what_a_killed_export_left_is_removed(tmp_path):
    left, link = tmp_path / ".out.exporting-01234567", tmp_path / ".out.exporting-76543210"
    (left / "deep").mkdir(parents=True)
    link.symlink_to(tmp_path)
    told = {os.path.basename(one.path): one for one in clean(tmp_path, quiet_s=0).directories}
    assert left.exists()
    assert told[link.name].kept == "it is a link"
    report = clean(tmp_path, dry_run=False, quiet_s=0)
    assert report.ok
    assert left_in(tmp_path) == {link.name}
    link.unlink()
    with pytest.raises(OptionError, match="holds no checkpoint"):
        clean(tmp_path)


@pytest.mark.parametrize("stock", [False, True])
def test_an_array_that_is_not_stored_is_not_left_out(tmp_path, stock):
    saved(tmp_path / "c", {"a": np.ones(3), "b": np.ones(3)}, stock=stock, use_ocdbt=False)
    (tmp_path / "c" / "a" / ".zarray").unlink()
    error = MalformedCheckpointError if stock else CorruptCheckpointError
    for do in (lazy_orbax.export, lambda c, out: lazy_orbax.merge([c, c], "uniform", out)):
        with pytest.raises(error, match=r"lea\w+ a"):
            do(tmp_path / "c", tmp_path / "out")
    assert left_in(tmp_path) == {"c"}


# The command line, and rules as JSON.


def test_the_command_writes_what_the_function_does(step, tmp_path, capsys):
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([["select", "w"], ["pad_to", "w", [9, None], {"value": 2}]]))
    arguments = ["export", str(step), str(tmp_path / "out"), "--rules", str(rules), "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    planned = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {**planned, "dry_run": False, "verified": True}
    wanted = np.concatenate([np.ones((8, 4), np.float32), np.full((1, 4), 2, np.float32)])
    assert_tensors(tmp_path / "out", {"w": wanted})
    assert main(arguments) == 2  # It is there now.
    rules.write_text("[")
    assert main(arguments) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "found dict, wanted a list of rules"),
        ([["exec", "x"]], "rule 0: found ['exec', 'x']; wanted [verb"),
        (["rename"], "rule 0: found 'rename'"),
        ([["drop", "a"], ["rename", "a"]], "rule 1: rename() missing 1 required"),
        ([["drop", "("]], "is no regular expression"),
    ],
)
def test_rules_that_mean_none_are_named(values, message):
    with pytest.raises(TransformError) as caught:
        map_of(values)
    assert message in str(caught.value)
