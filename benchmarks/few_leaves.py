"""A few leaves on CPU: `save()` and the step after it, and the first save of a process.

    python -m benchmarks.few_leaves --directory DIRECTORY --repeats 5 --out FILE

Each sample is a process of its own. `save()` alone does not tell what a save costs the loop: stock
Orbax copies on CPU only when the next step donates what it holds, so the two are added up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

from benchmarks.in_processes import parser_of, sample_of, tell

_STATES = {"2 leaves of 16 MiB": (2, 2**22), "40 leaves of 64 KiB": (40, 2**14)}
_SAVES = 12


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_sample(*arguments.child)))
        return
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for state in _STATES:
            for peer in ("stock", "lazy"):
                samples.setdefault((state, peer), []).append(
                    _in_a_process(peer, state, arguments.directory)
                )
    for (state, peer), found in samples.items():
        for measured in found[0]:
            values = [sample[measured] for sample in found]
            record = {
                "part": "few_leaves",
                "state": state,
                "peer": peer,
                "measured": measured,
                "median_ms": 1e3 * statistics.median(values),
                "least_ms": 1e3 * min(values),
                "most_ms": 1e3 * max(values),
                "n": len(values),
            }
            tell(record, arguments)


def _in_a_process(peer: str, state: str, directory: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as place:
        return sample_of("few_leaves", "--child", peer, state, place)


def _sample(peer: str, state_name: str, place: str) -> dict[str, float]:
    import jax
    import orbax.checkpoint as ocp

    import lazy_orbax

    n, size = _STATES[state_name]
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.5 + 1, state), donate_argnums=0)
    state = step({str(i): jax.numpy.full(size, i, jax.numpy.float32) for i in range(n)})
    state = jax.block_until_ready(step(state))
    lazy = peer == "lazy"
    handler = lazy_orbax.standard_handler() if lazy else ocp.StandardCheckpointHandler()
    saves, steps, quiet = [], [], []
    with ocp.CheckpointManager(place, item_handlers=handler) as manager:
        for number in range(_SAVES):
            begin_s = time.perf_counter()
            state = jax.block_until_ready(step(state))
            quiet.append(time.perf_counter() - begin_s)
            begin_s = time.perf_counter()
            manager.save(number, args=ocp.args.StandardSave(state))
            saved_s = time.perf_counter()
            state = jax.block_until_ready(step(state))
            saves.append(saved_s - begin_s)
            steps.append(time.perf_counter() - saved_s)
            manager.wait_until_finished()
    quiet_s = statistics.median(quiet)
    both = [save_s + step_s - quiet_s for save_s, step_s in zip(saves, steps, strict=True)]
    return {
        "first save()": saves[0],
        "first save() and what the next step takes longer": both[0],
        "save()": statistics.median(saves[2:]),
        "save() and what the next step takes longer": statistics.median(both[2:]),
    }


if __name__ == "__main__":
    main()
