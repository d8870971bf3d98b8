"""A process without lazy_orbax restores what lazy_orbax saved, and cannot tell the difference."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.described import contents
from equipment.oracle import STOCK_WARNS
from equipment.trees import abstract, on_mesh

import lazy_orbax

pytestmark = STOCK_WARNS
HERE = pathlib.Path(__file__)

# Runs isolated, in another directory: no variable, no user site, no working directory on the path.
READER = """
import json, os, pickle, sys
sys.path.insert(0, sys.argv[1])
sys.modules["lazy_orbax"] = None
try:
    import lazy_orbax
    raise SystemExit("lazy_orbax can be imported")
except ImportError:
    pass
import jax, numpy as np, orbax.checkpoint as ocp
from equipment.described import contents, description
root = sys.argv[2]
found = {}
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))

def describe(manager, item=None):
    metadata = manager.item_metadata(1)
    metadata = metadata if item is None else metadata[item]
    return description(metadata), str(type(metadata)), manager.metadata(1).item_handlers

def bits(tree):
    return repr(contents(tree))

for name in ("standard", "pytree", "direct"):
    for who in ("lazy", "stock"):
        path = f"{root}/{name}-{who}"
        with ocp.CheckpointManager(path) as manager:
            before = manager.item_metadata(1) is None
            found[name, who, "no args"] = bits(manager.restore(1))
            found[name, who, "step metadata"] = before, manager.metadata(1).item_handlers
        for reader in (ocp.StandardCheckpointHandler(), ocp.PyTreeCheckpointHandler()):
            with ocp.CheckpointManager(path, item_handlers=reader) as manager:
                metadata = manager.item_metadata(1)
                found[name, who, type(reader).__name__] = describe(manager)
        with ocp.CheckpointManager(path) as manager:
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                if hasattr(leaf, "shape") else 0,
                metadata.tree,
            )
            target["w"] = jax.ShapeDtypeStruct(
                target["w"].shape,
                target["w"].dtype,
                sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b")),
            )
            target["key"] = jax.random.key(0)
            found[name, who, "standard"] = bits(
                manager.restore(1, args=ocp.args.StandardRestore(target))
            )
        with ocp.CheckpointManager(path) as manager:
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            restore_args["key"] = ocp.ArrayRestoreArgs()
            restore_args["w"] = ocp.ArrayRestoreArgs(
                sharding=jax.sharding.SingleDeviceSharding(jax.devices()[5]), dtype=np.float16
            )
            args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
            found[name, who, "pytree"] = bits(manager.restore(1, args=args))

for who in ("lazy", "stock"):
    with ocp.CheckpointManager(f"{root}/composite-{who}") as manager:
        restored = manager.restore(1)
        found["composite", who, "no args"] = [
            bits(restored.state), bits(restored.ema), restored.iterator, sorted(restored.keys())
        ]
        found["composite", who, "metadata"] = describe(manager, "state"), describe(manager, "ema")
    with ocp.CheckpointManager(f"{root}/composite-{who}") as manager:
        restored = manager.restore(1, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            ema=ocp.args.PyTreeRestore(item=target, restore_args=restore_args),
            iterator=ocp.args.JsonRestore(),
        ))
        found["composite", who, "args"] = [
            bits(restored.state), bits(restored.ema), restored.iterator
        ]

with open(sys.argv[3], "wb") as file:
    pickle.dump(found, file)
"""

CUSTOM = {"run": "seven", "nested": {"list": [1, 2.5, None]}}


def state_of(mesh):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 8)).astype(np.float32)
    return {
        "w": on_mesh(w, mesh, "a", "b"),
        "opt": (3, {"mu": rng.standard_normal(5)}),
        "key": jax.random.key(5),
        "none": None,
    }


def handlers(who):
    """Returns handlers of standard, pytree and direct form, with the args that each saves."""
    if who == "lazy":
        return {
            "standard": (lazy_orbax.standard_handler(), ocp.args.StandardSave),
            "pytree": (lazy_orbax.pytree_handler(), ocp.args.PyTreeSave),
            "direct": (lazy_orbax.LazyCheckpointHandler(), lazy_orbax.args.LazySave),
        }
    plain = ocp.StandardCheckpointHandler()
    plain._impl = ocp.PyTreeCheckpointHandler(use_compression=False)
    return {
        "standard": (plain, ocp.args.StandardSave),
        "pytree": (ocp.PyTreeCheckpointHandler(use_compression=False), ocp.args.PyTreeSave),
        "direct": (ocp.PyTreeCheckpointHandler(use_compression=False), ocp.args.PyTreeSave),
    }


def save_everything(root, mesh):
    state = state_of(mesh)
    for who in ("lazy", "stock"):
        for name, (handler, save_args) in handlers(who).items():
            with ocp.CheckpointManager(root / f"{name}-{who}", item_handlers=handler) as manager:
                manager.save(1, args=save_args(state, custom_metadata=CUSTOM))
        made = handlers(who)
        with ocp.CheckpointManager(
            root / f"composite-{who}",
            item_handlers={
                "state": made["standard"][0],
                "ema": made["pytree"][0],
                "iterator": ocp.JsonCheckpointHandler(),
            },
        ) as manager:
            composite = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                ema=ocp.args.PyTreeSave(state),
                iterator=ocp.args.JsonSave({"position": 3}),
            )
            manager.save(1, args=composite)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns what a process without lazy_orbax read, by checkpoint, author and way."""
    root = tmp_path_factory.mktemp("saved")
    save_everything(root, jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")))
    result = root / "result.pickle"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    process = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(HERE.parents[1]), str(root), str(result)],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return pickle.loads(result.read_bytes())


SINGLE = [
    (name, way)
    for name in ("standard", "pytree", "direct")
    for way in (
        "no args",
        "standard",
        "pytree",
        "step metadata",
        "StandardCheckpointHandler",
        "PyTreeCheckpointHandler",
    )
]


BOTH = [("composite", "no args"), ("composite", "args")]


@pytest.mark.parametrize(("name", "way"), [*SINGLE, *BOTH])
def test_it_reads_ours_as_it_reads_stock(name, way, found):
    assert found[name, "lazy", way] == found[name, "stock", way]


def test_it_describes_two_items_as_it_describes_stock(found):
    assert found["composite", "lazy", "metadata"] == found["composite", "stock", "metadata"]


def test_it_restores_the_bits_that_were_saved(found, mesh):
    state = state_of(mesh)
    wanted = {path: bits for path, _, bits in contents(state)}
    for name in ("standard", "pytree", "direct"):
        text = found[name, "lazy", "no args"]
        for path, bits in wanted.items():
            assert repr(bits) in text, (name, path)


def test_item_metadata_holds_what_was_given(found):
    for name in ("standard", "pytree", "direct"):
        (_, leaves, custom), _, handler = found[name, "lazy", "PyTreeCheckpointHandler"]
        assert custom == CUSTOM
        assert "lazy" not in str(handler)
        assert len(leaves) == 4


def test_a_target_with_everything_in_it(mesh, tmp_path):
    """The same through our own handler in this process, where the names stay stock too."""
    state = state_of(mesh)
    with ocp.CheckpointManager(tmp_path, item_handlers=lazy_orbax.standard_handler()) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        restored = manager.restore(1, args=ocp.args.StandardRestore(abstract(state)))
    assert repr(contents(restored)) == repr(contents(state))
