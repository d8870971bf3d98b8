"""Stock Orbax as the oracle: the same tree and arguments, saved by it and by us, side by side."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from equipment.described import contents, description
from equipment.trees import abstract
from etils import epath

import lazy_orbax
from lazy_orbax.integrity.digest_file import DIRECTORY

FACES = ("standard", "pytree", "direct")
MODES = ("stage", "direct")

# Put on modules that let stock fail or restore without a target: `pytestmark = STOCK_WARNS`.
STOCK_WARNS = [
    # Without a target stock warns that it takes the sharding from a file.
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
    # Where it fails in mid-save or mid-restore it leaves its coroutines behind.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("restores_that_fail"),
]


@dataclasses.dataclass(frozen=True)
class Face:
    """One way to use a handler: how to make it, stock and ours, and the args it takes."""

    stock: Callable[..., Any]
    lazy: Callable[..., Any]
    save: Callable[..., Any]
    restore: Callable[..., Any]
    stock_save: Callable[..., Any]
    stock_restore: Callable[..., Any]


def face(name: str) -> Face:
    """Returns the face called `name`: standard, pytree or direct."""
    return {
        "standard": Face(
            _stock_standard,
            lazy_orbax.standard_handler,
            ocp.args.StandardSave,
            ocp.args.StandardRestore,
            ocp.args.StandardSave,
            ocp.args.StandardRestore,
        ),
        "pytree": Face(
            ocp.PyTreeCheckpointHandler,
            lazy_orbax.pytree_handler,
            ocp.args.PyTreeSave,
            ocp.args.PyTreeRestore,
            ocp.args.PyTreeSave,
            ocp.args.PyTreeRestore,
        ),
        "direct": Face(
            ocp.PyTreeCheckpointHandler,
            lazy_orbax.LazyCheckpointHandler,
            lazy_orbax.args.LazySave,
            lazy_orbax.args.LazyRestore,
            ocp.args.PyTreeSave,
            ocp.args.PyTreeRestore,
        ),
    }[name]


def _stock_standard(**kwargs: Any) -> ocp.StandardCheckpointHandler:
    """Returns a stock standard handler; its own signature takes only some of the keywords."""
    handler = ocp.StandardCheckpointHandler()
    handler._impl = ocp.PyTreeCheckpointHandler(**kwargs)
    return handler


def save(handler: Any, directory: pathlib.Path, args: Any) -> None:
    """Saves with a bare handler, as a checkpointer would, into a directory of its own."""
    directory.mkdir(parents=True)
    path = epath.Path(directory)
    handler.save(path, args=args)
    handler.finalize(path)


def restore(handler: Any, directory: pathlib.Path, args: Any = None) -> Any:
    """Restores with a bare handler."""
    path = epath.Path(directory)
    return handler.restore(path) if args is None else handler.restore(path, args=args)


def attempt(action: Callable[[], Any]) -> tuple[str, Any]:
    """Returns `accepted` and what the action returned, or `refused` and the error."""
    try:
        return "accepted", action()
    except Exception as error:  # noqa: BLE001
        refusal = error
    # What stock left behind is to be complained about now, not in whatever test comes later.
    link: BaseException | None = refusal
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    gc.collect()
    return "refused", refusal


def described(handler: Any, directory: pathlib.Path) -> Any:
    """Returns the item metadata of a checkpoint as values to compare, or that there is none."""
    how, value = attempt(lambda: description(handler.metadata(epath.Path(directory))))
    return how, value if how == "accepted" else type(value)


def stored(directory: pathlib.Path) -> dict[str, Any]:
    """Returns everything a checkpoint holds: JSON as values, the rest (chunks, Zarr) as bytes.

    An OCDBT database is opened: how it divides its keys into files is not part of the format.
    """
    found: dict[str, Any] = {}
    for file in sorted(directory.rglob("*")):
        name = str(file.relative_to(directory))
        if file.is_dir() or name.startswith("ocdbt.process_"):
            continue
        if name.startswith(f"{DIRECTORY}/"):  # Ours, which stock Orbax ignores.
            continue
        if name == "manifest.ocdbt" or name.startswith("d/"):
            continue
        found[name] = file.read_bytes()
    if (directory / "manifest.ocdbt").exists():
        kvstore = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()
        for key in kvstore.list().result():
            found["ocdbt:" + key.decode()] = kvstore.read(key).result().value
    return {name: _as_json(name, content) for name, content in found.items()}


def _as_json(name: str, content: bytes) -> Any:
    small = ("_METADATA", "_sharding", "_strings.json", ".zarray", "zarr.json")
    if name.endswith(small) or name.startswith("array_metadatas/"):
        value = json.loads(content)
        if name == "_sharding":
            return {leaf: json.loads(text) for leaf, text in value.items()}
        if name.startswith("array_metadatas/"):
            value["array_metadatas"].sort(key=lambda entry: str(entry))
        return value
    return content


def arrays_restored_as(value: Any) -> ocp.RestoreArgs:
    """Returns restore args that put a leaf back exactly as `value` is."""
    if isinstance(value, jax.Array):
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=value.sharding, dtype=value.dtype
        )
    if isinstance(value, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.RestoreArgs(restore_type=type(value))


def readable(directory, handler, face_name, tree):
    """Returns what restoring gives, without a target and with one, or that it is refused."""
    restore_args = (
        ocp.args.StandardRestore(abstract(tree))
        if face_name == "standard"
        else ocp.args.PyTreeRestore(tree, jax.tree.map(arrays_restored_as, tree))
    )
    found = []
    for args in (None, restore_args):
        kind, value = attempt(lambda args=args: restore(handler, directory, args))
        found.append((kind, repr(contents(value)) if kind == "accepted" else None))
    return found


def bits_of(tree):
    """Returns the bytes of arrays, bit for bit."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def bits_stored(directory, tree):
    """Returns the bytes of what is stored, which stock reads into host memory."""
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
    args = ocp.args.PyTreeRestore(restore_args=restore_args)
    return bits_of(restore(ocp.PyTreeCheckpointHandler(), directory, args))


def same(found: Any, wanted: Any) -> None:
    """Asserts that two trees agree in structure, in types, in shardings and in bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert repr(contents(found)) == repr(contents(wanted))
