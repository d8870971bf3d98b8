"""What a snapshot in memory costs the loop, and how fast it comes back.

    python -m benchmarks.keeper --directory DIRECTORY --repeats 5 --out FILE

Each sample is a process of its own: 1000 leaves of 256 KiB, idle steps, one save every ten steps,
which goes nowhere, to disk, to memory, or to both. Then 1 GB is restored from memory onto CPU
devices, beside a plain copy of as many bytes to fresh memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

from benchmarks.in_processes import parser_of, sample_of, tell

PEERS = ("none", "disk", "memory", "both")
_SAVES, _STEPS, _IDLE_S = 6, 10, 0.1
_GB = 10**9


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--leaves", type=int, default=1000, help="of 256 KiB")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, place, n_leaves = arguments.child
        sample = _restore(place) if what == "restore" else _loop(what, place, int(n_leaves))
        print(json.dumps(sample))
        return
    samples: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for what in (*PEERS, "restore"):
            found = _in_a_process(what, arguments.directory, arguments.leaves)
            samples.setdefault(what, []).append(found)
    for what, found in samples.items():
        for measured in found[0]:
            values = [_relative(one, measured, samples["none"][i]) for i, one in enumerate(found)]
            record = {
                "part": "keeper",
                "peer": what,
                "measured": measured,
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "n": len(values),
            }
            tell(record, arguments)


def _relative(sample: dict[str, float], measured: str, none: dict[str, float]) -> float:
    """Returns what a save adds to a loop that saves nothing, in the same round."""
    if measured in ("loop_s_per_save", "cpu_s_per_save"):
        return sample[measured] - none[measured]
    return sample[measured]


def _in_a_process(what: str, directory: str | None, n_leaves: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as place:
        return sample_of("keeper", "--child", what, place, str(n_leaves))


def _loop(what: str, place: str, n_leaves: int) -> dict[str, float]:
    import jax
    import orbax.checkpoint as ocp

    import lazy_orbax
    from benchmarks.meters import cpu_s

    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.5 + 1, state), donate_argnums=0)
    state = {f"leaf_{i:04}": jax.numpy.full((256, 256), i, "float32") for i in range(n_leaves)}
    keeper = lazy_orbax.Keeper(place) if what in ("memory", "both") else None
    options = lazy_orbax.LazyOptions(keeper=keeper if what == "both" else None)
    handler = lazy_orbax.standard_handler(options=options)
    one_step = ocp.CheckpointManagerOptions(max_to_keep=1)
    in_save_s: list[float] = []
    with ocp.CheckpointManager(place, item_handlers=handler, options=one_step) as manager:

        def save(number: int) -> None:
            start_s = time.perf_counter()
            if what in ("disk", "both"):
                manager.save(number, args=ocp.args.StandardSave(state))
            if keeper is not None:
                keeper.save(number, state)
            in_save_s.append(time.perf_counter() - start_s)

        def run(saves: range) -> None:
            nonlocal state
            for number in saves:
                save(number)
                for _ in range(_STEPS):
                    state = jax.block_until_ready(step(state))
                    time.sleep(_IDLE_S)

        run(range(2))  # Compiles, and makes both generations.
        in_save_s.clear()
        manager.wait_until_finished()
        start_s, start_cpu_s = time.perf_counter(), cpu_s()
        run(range(2, 2 + _SAVES))
        loop_s = time.perf_counter() - start_s
        manager.wait_until_finished()
        if keeper is not None:
            keeper.wait()
        used_s = cpu_s() - start_cpu_s
    found = {
        "loop_s_per_save": loop_s / _SAVES,
        "cpu_s_per_save": used_s / _SAVES,
        "in_save_s": statistics.median(in_save_s),
    }
    if keeper is not None:
        assert keeper.report.kept == 2 + _SAVES, keeper.report
        keeper.close()
    return found


def _restore(place: str) -> dict[str, float]:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    import lazy_orbax

    n_leaves = _GB // 2**24
    state = {f"leaf_{i:02}": jax.numpy.full((2048, 2048), i, "float32") for i in range(n_leaves)}
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    with lazy_orbax.Keeper(place) as keeper, ocp.CheckpointManager(place) as manager:
        keeper.save(1, state)
        keeper.wait()
        # Between memory that is there: the first touch of fresh pages takes longer than the copy.
        whole, other = (np.full(n_leaves * 2**22, i, np.float32) for i in range(2))
        start_s = time.perf_counter()
        np.copyto(other, whole)
        copied_s = time.perf_counter() - start_s
        del whole, other, state
        start_s = time.perf_counter()
        args = ocp.args.StandardRestore(like)
        found = lazy_orbax.restore_newest(manager, keeper, args=args)
        jax.block_until_ready(found.value)
        restored_s = time.perf_counter() - start_s
        assert found.tier == "memory"
    return {"restore_s": restored_s, "memcpy_s": copied_s}


if __name__ == "__main__":
    main()
