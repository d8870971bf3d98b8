"""A process that restores checkpoints nobody trusts, and tells how each ended. See `fuzz.py`."""

from __future__ import annotations

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import gc
import json
import logging
import pathlib
import re
import resource
import shutil
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from equipment.trees import abstract, all_bits, on_mesh
from etils import epath
from orbax.checkpoint import msgpack_utils
from trust import combined

import lazy_orbax
from lazy_orbax.restore import load
from lazy_orbax.trust import declared_sizes, malformed

# What the library is told that this machine has.
MEMORY_BYTES = 256 * 2**20
_ADDRESS_SPACE_BYTES = 12 * 2**30
# A mistake in a program, and not a message to its user.
_UNCLEAR = (
    *(KeyError, IndexError, TypeError, AttributeError, AssertionError, RecursionError, NameError),
    *(MemoryError, OverflowError, UnicodeError, ZeroDivisionError, StopIteration),
)


def _tree() -> dict[str, Any]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    return {
        "params": {
            "kernel": on_mesh(np.arange(64, dtype=np.float32).reshape(16, 4), mesh, "x"),
            "bias": on_mesh(np.arange(4).astype(jnp.bfloat16), mesh),
            "größe": on_mesh(np.arange(6, dtype=np.int8), mesh, "x"),
        },
        "layers": [{"w": on_mesh(np.full((2, 3), i, np.int32), mesh)} for i in range(3)],
        "host": np.linspace(0, 1, 300),
        "step": 12,
        "rate": 0.5,
        "name": "a text",
        "key": jax.random.key(7),
        "nothing": None,
        "empty": {},
    }


def _older(directory: pathlib.Path) -> None:
    """Makes of plain Zarr what Orbax wrote before there was `_METADATA`."""
    (directory / "_METADATA").unlink()
    tree: dict[str, Any] = {"inside": np.arange(3), "params": {}}
    for folder in sorted(directory.iterdir()):
        if (folder / ".zarray").exists():
            *outer, last = folder.name.split(".")
            inner = tree
            for name in outer:
                inner = inner.setdefault(name, {})
            inner[last] = f"PLACEHOLDER://{folder.name}"
    (directory / "checkpoint").write_bytes(msgpack_utils.msgpack_serialize(tree))


def _deep(directory: pathlib.Path) -> None:
    """Writes an OCDBT database again, as a tree of several levels."""
    base = f"file://{directory}/"
    stored = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    content = {key: stored[key] for key in stored.list().result()}
    for folder in ("d", "ocdbt.process_0"):
        shutil.rmtree(directory / folder)
    (directory / "manifest.ocdbt").unlink()
    config = {"max_inline_value_bytes": 64, "max_decoded_node_bytes": 600}
    again = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    transaction = ts.Transaction()
    for key, value in content.items():
        again.with_transaction(transaction)[key] = value
    transaction.commit_sync()


# Name: whether we or stock Orbax write it, the handler's keywords, what is done to it then.
BASES: dict[str, tuple[bool, dict[str, Any], Any]] = {
    "ours": (True, {}, None),
    "stock": (False, {}, None),
    "zarr3": (False, {"use_zarr3": True}, None),
    "plain": (False, {"use_ocdbt": False}, None),
    "plain zarr3": (True, {"use_ocdbt": False, "use_zarr3": True}, None),
    "deep": (True, {}, _deep),
    "older": (False, {"use_ocdbt": False}, _older),
}


def _target(name: str) -> Any:
    tree = _tree()
    if name == "older":
        tree = {"params": tree["params"], "host": tree["host"]}
    return tree


def build(root: pathlib.Path) -> None:
    """Writes the valid checkpoints that are spoiled, each into a directory of its own."""
    for name, (is_lazy, keywords, change) in BASES.items():
        directory = epath.Path(root / name)
        directory.mkdir(parents=True)
        make = lazy_orbax.pytree_handler if is_lazy else ocp.PyTreeCheckpointHandler
        handler = make(**keywords)
        handler.save(directory, args=ocp.args.PyTreeSave(_target(name)))
        handler.finalize(directory)
        handler.close()
        if change:
            change(root / name)


class Restorer:
    """Restores a checkpoint in each way, and compares with what the valid one holds."""

    def __init__(self, root: pathlib.Path):
        self._pytree = lazy_orbax.pytree_handler()
        self._valid = {name: self._bits(root / name, name) for name in BASES}

    def _ways(self, directory: pathlib.Path, name: str) -> dict[str, Any]:
        path, target = epath.Path(directory), abstract(_target(name))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args)
        if name == "older":
            # What stock Orbax needs for these: one array is in the file of the tree itself.
            args.transforms = {}
        ways = {
            "target": lambda: self._pytree.restore(path, args=args),
            "no target": lambda: self._pytree.restore(path),
        }
        if name != "older":
            ways["load"] = lambda: lazy_orbax.load(path)
            ways["load like"] = lambda: lazy_orbax.load(path, like=target)
        return ways

    def _bits(self, directory: pathlib.Path, name: str) -> dict[str, Any]:
        return {way: all_bits(restore()) for way, restore in self._ways(directory, name).items()}

    def outcome(self, directory: pathlib.Path, name: str) -> list[tuple[str, str]]:
        """Returns how each way to restore ended, and what was said."""
        ended = []
        for way, restore in self._ways(directory, name).items():
            try:
                found = all_bits(restore())
            except Exception as error:  # noqa: BLE001
                ended.append((_clarity(error, directory), f"{way}: {_text(error)}"))
            else:
                same = found == self._valid[name][way]
                ended.append(("same" if same else "different", way))
        return ended


class Combining:
    """Merges, searches and exports, and compares with what comes of the valid one."""

    def __init__(self, root: pathlib.Path):
        # Those need a checkpoint that says what it holds.
        names = [name for name in BASES if name != "older"]
        self._combiner = combined.Combiner(root, names)

    def outcome(self, directory: pathlib.Path, name: str) -> list[tuple[str, str]]:
        """Returns how each way to combine ended, and what was said."""
        ended = []
        for way, do in self._combiner.ways(directory, name).items():
            try:
                found = do()
            except Exception as error:  # noqa: BLE001
                ended.append((_clarity(error, directory), f"{way}: {_text(error)}"))
            else:
                same = found == self._combiner.valid[name][way]
                ended.append(("same" if same else "different", way))
        return ended


def _text(error: BaseException) -> str:
    notes = " ".join(getattr(error, "__notes__", []))
    return f"{type(error).__name__}: {error} {notes}"[:2000].encode(errors="replace").decode()


def _clarity(error: BaseException, directory: pathlib.Path) -> str:
    if isinstance(error, lazy_orbax.errors.LazyOrbaxError):
        return "refused"
    texts, link = [], error
    while link is not None:
        texts.append(str(link))
        link = link.__cause__ or link.__context__
    text = " ".join(texts)
    if str(directory) in text or re.search(r"params|layers|host|step|rate|name|key", text):
        return "unclear" if isinstance(error, _UNCLEAR) else "named"
    return "unclear" if isinstance(error, _UNCLEAR) else "noted"


def _peak_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    root = pathlib.Path(sys.argv[1])
    if not root.exists():
        build(root)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES,) * 2)
    for module in (malformed, declared_sizes, load):
        module.memory_bytes = lambda: MEMORY_BYTES
    restorer = {"restore": Restorer, "combine": Combining}[sys.argv[2]](root)
    replies.write(json.dumps({"ready": _peak_bytes()}) + "\n")
    for number, line in enumerate(sys.stdin):
        name, directory = json.loads(line)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _peak_bytes()
        start = time.monotonic()
        ended = restorer.outcome(pathlib.Path(directory), name)
        took_s = time.monotonic() - start
        grown = _peak_bytes() - before
        if number % 50 == 0:
            gc.collect()
        reply = {"ended": ended, "grown_bytes": grown, "took_s": took_s, "rss_bytes": before}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
