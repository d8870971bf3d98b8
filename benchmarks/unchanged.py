"""What is saved where 90% of the state is frozen: with `skip_unchanged`, without, and by stock.

    python -m benchmarks.unchanged --directory DIRECTORY --repeats 5 --out FILE

The ways take turns, each in a process of its own. Bytes are what the files of a save take, a file
with two names once; CPU seconds are those of the whole process while it saves, its threads and the
kernel's work for it included. They hold on a busy machine, wall times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

from benchmarks.in_processes import parser_of, sample_of, tell

WAYS = (
    *("stock", "lazy", "lazy, skip_unchanged"),
    *("lazy, OCDBT", "lazy, OCDBT, skip_unchanged"),
)
_LEAVES, _FROZEN, _SAVES = 20, 18, 6


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=int, default=16, help="of each of 20 leaves")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(sample(*arguments.child, arguments.megabytes)))
        return
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way in WAYS:
            samples[way].append(_in_a_process(way, arguments.directory, arguments.megabytes))
    for way, found in samples.items():
        record = {"part": "unchanged", "way": way, "n": len(found)}
        for measured in found[0]:
            values = [one[measured] for one in found]
            record[measured] = statistics.median(values)
            record[f"{measured}, least and most"] = [min(values), max(values)]
        tell(record, arguments)


def _in_a_process(way: str, directory: str | None, megabytes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as place:
        return sample_of("unchanged", "--megabytes", str(megabytes), "--child", way, place)


def sample(way: str, place: str, megabytes: int) -> dict[str, float]:
    """Returns what one save costs, the first of a run left out."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    import lazy_orbax

    rng = np.random.default_rng(0)
    size = megabytes * 2**18
    leaves = [jax.numpy.asarray(rng.normal(size=size).astype(np.float32)) for _ in range(_LEAVES)]
    change = jax.jit(lambda leaf: leaf + 1)
    options = lazy_orbax.LazyOptions(skip_unchanged=way.endswith("skip_unchanged"))
    handler = (
        ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        if way == "stock"
        else lazy_orbax.pytree_handler(options=options, use_ocdbt="OCDBT" in way)
    )
    cpu, wall = [], []
    with ocp.CheckpointManager(place, item_handlers=handler) as manager:
        for step in range(_SAVES):
            leaves[_FROZEN:] = [change(leaf) for leaf in leaves[_FROZEN:]]
            jax.block_until_ready(leaves)
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            manager.save(step, args=ocp.args.PyTreeSave(leaves))
            manager.wait_until_finished()
            cpu.append(time.process_time() - cpu_s)
            wall.append(time.perf_counter() - wall_s)
    first = bytes_on_disk(pathlib.Path(place) / "0")
    n_bytes = (bytes_on_disk(pathlib.Path(place)) - first) / (_SAVES - 1)
    cpu_s, wall_s = statistics.median(cpu[1:]), statistics.median(wall[1:])
    return {"bytes of a save": n_bytes, "CPU seconds": cpu_s, "seconds to committed": wall_s}


def bytes_on_disk(directory: pathlib.Path) -> int:
    """Returns the bytes of the files below a directory, each once however many names it has."""
    found = (os.lstat(path) for path in directory.rglob("*") if path.is_file())
    return sum({(one.st_dev, one.st_ino): one.st_size for one in found}.values())


if __name__ == "__main__":
    main()
