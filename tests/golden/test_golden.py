"""Steps that this and older versions of lazy_orbax wrote: every later version reads them.

`python tests/golden/test_golden.py NAME...` writes the steps of these names again, or all that this
version writes. What an older version wrote is written by that version alone:
`PYTHONPATH=OLDER_CHECKOUT python tests/golden/test_golden.py digests_before_place`.

When a format changes, give the new one a new name, and keep what is there.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json
import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lazy_orbax

TESTS = pathlib.Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from equipment.trees import abstract, assert_same, on_mesh

STEPS = TESTS / "golden" / "steps"
STEP = 3
# Name of each step: settings of the handler, options.
TODAY = {
    "ocdbt_zarr2": ({"use_ocdbt": True, "use_zarr3": False}, {"verify_snapshot": 1}),
    "ocdbt_zarr3": ({"use_ocdbt": True, "use_zarr3": True}, {"verify_snapshot": 1}),
    "plain_zarr2": ({"use_ocdbt": False, "use_zarr3": False}, {"verify_snapshot": 1}),
    "plain_zarr3": ({"use_ocdbt": False, "use_zarr3": True}, {"verify_snapshot": 1}),
}
# Their digests name neither the place that they were written for nor fingerprints.
BEFORE_PLACE = {"digests_before_place": ({"use_ocdbt": True, "use_zarr3": False}, {})}
ALL = TODAY | BEFORE_PLACE


def state() -> dict[str, Any]:
    """What was saved: shards, replicas, a half precision, a key, a host array, numbers."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    ramp = np.arange(24).reshape(4, 6)
    return {
        "weights": on_mesh(ramp.astype(np.float32) / 7, mesh, "x"),
        "half": on_mesh(ramp.astype(ml_dtypes.bfloat16), mesh, None, "x"),
        "replicated": on_mesh(np.arange(-5, 5, dtype=np.int8), mesh),
        "odd": on_mesh(np.array([np.nan, -0.0, np.inf, 1e-45], np.float32), mesh, "x"),
        "key": jax.device_put(jax.random.key(5), on_mesh(np.float32(0), mesh).sharding),
        "optimizer": [{"count": on_mesh(np.int32(17), mesh)}, None],
        "host": np.linspace(0, 1, 7),
        "epoch": 11,
    }


def write(name: str) -> None:
    """Writes a golden step where it belongs."""
    settings, options = ALL[name]
    handler = lazy_orbax.pytree_handler(options=lazy_orbax.LazyOptions(**options), **settings)
    shutil.rmtree(STEPS / name, ignore_errors=True)
    with ocp.CheckpointManager(STEPS / name, item_handlers=handler) as manager:
        manager.save(STEP, args=ocp.args.PyTreeSave(state()))
    for file in (STEPS / name).rglob("commit_success.txt"):  # Orbax says where it was.
        file.write_text(file.read_text().replace(f"{TESTS}/", ""))


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the golden step: no test touches what is committed."""
    return shutil.copytree(STEPS / request.param, tmp_path / "run")


of_all = pytest.mark.parametrize("run", ALL, indirect=True)


def digests_of(run: pathlib.Path) -> dict[str, Any]:
    file = run / str(STEP) / "default" / "lazy_orbax_digests" / "process_0"
    return json.loads(file.read_bytes())


@pytest.mark.parametrize("name", ALL)
def test_a_golden_step_is_of_the_form_that_it_stands_for(name):
    (settings, _), item = ALL[name], STEPS / name / str(STEP) / "default"
    assert (item / "manifest.ocdbt").exists() == settings["use_ocdbt"]
    if not settings["use_ocdbt"]:
        metadata = "zarr.json" if settings["use_zarr3"] else ".zarray"
        assert (item / "weights" / metadata).is_file()
    assert json.loads((item / "_METADATA").read_text())["use_zarr3"] == settings["use_zarr3"]
    assert {"place", "proof"} & set(digests_of(STEPS / name)) == (
        {"place", "proof"} if name in TODAY else set()
    )


@of_all
def test_ours_restores_it(run):
    target = state()
    with ocp.CheckpointManager(run, item_handlers=lazy_orbax.standard_handler()) as manager:
        found = manager.restore(STEP, args=ocp.args.StandardRestore(abstract(target)))
    assert_same(found, target)


@of_all
def test_stock_restores_it(run):
    target = state()
    with ocp.CheckpointManager(run, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        found = manager.restore(STEP, args=ocp.args.StandardRestore(abstract(target)))
    assert_same(found, target)


@of_all
def test_it_is_as_its_digests_say(run):
    report = lazy_orbax.verify(run)
    assert report.is_whole
    assert [item.not_covered for item in report.items] == [()]


@of_all
def test_damage_is_found(run):
    item = run / str(STEP) / "default"
    found = set()
    for file in [path for path in item.rglob("*") if path.is_file() and path.stat().st_size]:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 8]))
        if not lazy_orbax.verify(run).is_whole:
            found.add(file.relative_to(item).parts[0])
        file.write_bytes(content)
    assert {"_METADATA", "lazy_orbax_digests"} < found
    assert found & {"d", "weights"}, "the values of the weights"


if __name__ == "__main__":
    for name in sys.argv[1:] or TODAY:
        write(name)
        print(STEPS / name)
