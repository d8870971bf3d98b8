"""One small step of every kind of file, and bytes of it flipped in place."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from equipment.trees import abstract, on_mesh, random_array

import lazy_orbax

FORMS = {
    "ocdbt-zarr2": {},
    "ocdbt-zarr2-zstd": {"use_compression": True},
    "ocdbt-zarr3": {"use_zarr3": True},
    "plain-zarr2": {"use_ocdbt": False},
    "plain-zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "plain-zarr3-zstd": {"use_ocdbt": False, "use_zarr3": True, "use_compression": True},
}


def tree(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Leaves that OCDBT stores in a file of their own, and some that it puts into its tree."""
    rng = np.random.default_rng(0)
    return {
        "large": on_mesh(random_array(rng, (128, 64), np.float32), mesh, "a", "b"),
        "half": on_mesh(random_array(rng, (32, 48), jnp.bfloat16), mesh, None, "b"),
        "small": on_mesh(random_array(rng, (3,), np.int8), mesh),
        "key": jax.random.key(7),
        "host": random_array(rng, (5, 7), np.int64),
        "number": 3,
    }


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run with one step.

    Attributes:
        directory: of the run.
        form: keywords of the handler.
        value: what was saved.
        target: how to restore it.
    """

    directory: pathlib.Path
    form: dict[str, Any]
    value: Any
    target: Any

    def restore(self, **options: Any) -> Any:
        """Restores the step with a manager of its own."""
        with self.manager(**options) as manager:
            return manager.restore(1, args=ocp.args.StandardRestore(self.target))

    def manager(self, **options: Any) -> ocp.CheckpointManager:
        handler = lazy_orbax.standard_handler(
            **self.form, options=lazy_orbax.LazyOptions(**options)
        )
        return ocp.CheckpointManager(self.directory, item_handlers=handler)

    def files(self) -> dict[str, list[pathlib.Path]]:
        """Returns the files of the step by their kind."""
        kinds: dict[str, list[pathlib.Path]] = {}
        for file in sorted((self.directory / "1").rglob("*")):
            if file.is_file() and file.stat().st_size:
                kinds.setdefault(_kind(file.relative_to(self.directory)), []).append(file)
        return kinds


def save(directory: pathlib.Path, form: str, mesh: jax.sharding.Mesh) -> Saved:
    """Saves one step."""
    value = tree(mesh)
    saved = Saved(directory, FORMS[form], value, abstract(value))
    with saved.manager() as manager:
        manager.save(1, args=ocp.args.StandardSave(value), custom_metadata={"epoch": 1})
        manager.wait_until_finished()
    return saved


def _kind(file: pathlib.Path) -> str:
    name, parent = file.name, file.parent.name
    if parent == "d":
        return f"{'ocdbt.process_0/' if 'ocdbt.process_0' in file.parts else ''}d/*"
    if parent in ("array_metadatas", "lazy_orbax_digests", "ocdbt.process_0"):
        return f"{parent}/{name}"
    known = name.startswith(("_", ".z", "zarr", "manifest", "commit"))
    if name == "commit_success.txt":
        return f"{'item' if parent == 'default' else 'step'}'s {name}"
    return name if known else "chunk"


def positions(files: list[pathlib.Path], rng: random.Random) -> Iterator[tuple[pathlib.Path, int]]:
    """Returns the first, the last and some other bytes of files of one kind."""
    some = files if len(files) <= 4 else rng.sample(files, 4)
    largest = max(files, key=lambda file: file.stat().st_size)
    for file in {largest, *some}:
        size = file.stat().st_size
        yield from ((file, at) for at in sorted({0, size - 1, rng.randrange(size)}))
    size = largest.stat().st_size
    yield from ((largest, rng.randrange(size)) for _ in range(3))


@contextlib.contextmanager
def flipped(file: pathlib.Path, at: int, bit: int) -> Iterator[None]:
    """Flips one bit of a file, and flips it back."""
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[at] ^= 1 << bit
    file.write_bytes(broken)
    try:
        yield
    finally:
        file.write_bytes(whole)
