"""What a process that saves many different trees keeps of each: memory per tree, ours or stock's.

python -m benchmarks.many_trees lazy
python -m benchmarks.many_trees stock

On CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=8` makes the devices more than one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import pathlib
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

_HANDLERS = {"lazy": lazy_orbax.standard_handler, "stock": ocp.StandardCheckpointHandler}
_EVERY = 25


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("who", choices=_HANDLERS)
    arguments.add_argument("--trees", type=int, default=150, help=f"at least {2 * _EVERY}")
    arguments.add_argument("--leaves", type=int, default=20)
    arguments.add_argument("--directory", type=pathlib.Path)
    given = arguments.parse_args()
    mesh = Mesh(np.array(jax.devices()), ("a",))
    found: list[tuple[int, float]] = []
    with (
        tempfile.TemporaryDirectory(dir=given.directory) as directory,
        ocp.AsyncCheckpointer(_HANDLERS[given.who]()) as checkpointer,
    ):
        for i in range(given.trees):
            tree = _tree(i, given.leaves, mesh)
            place = pathlib.Path(directory, "item")
            checkpointer.save(place, args=ocp.args.StandardSave(tree), force=True)
            checkpointer.wait_until_finished()
            if (i + 1) % _EVERY == 0:
                found.append((i + 1, _resident_mb()))
                print(f"{given.who}: {i + 1} trees, {found[-1][1]:.0f} MB", flush=True)
    # The first trees fill what is bounded.
    (first, before), (last, after) = found[min(1, len(found) - 1)], found[-1]
    per_tree = (after - before) / max(last - first, 1)
    print(f"{given.who}: {per_tree:.2f} MB per tree from {first} to {last}")


def _tree(i: int, n_leaves: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a tree whose names and shapes no other has."""
    shape = (8, 16 + i)
    return {
        f"tree_{i}_leaf_{k}": jax.device_put(
            np.full(shape, k, np.float32), NamedSharding(mesh, P("a") if k % 2 else P())
        )
        for k in range(n_leaves)
    }


def _resident_mb() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
