"""What a save of the parameters alone costs beside one of the whole state: time, CPU, bytes.

    python -m benchmarks.dense_params --directory DIRECTORY --mib 64 --repeats 10 --out FILE

The state is parameters in float32 and two moments of Adam. Saves of the state, of its parameters,
and of these in bfloat16 take turns in one loop whose step donates the state. `added` is the time
inside `params_of` and `save()`, and what the step after it takes longer than the median step
without a save.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import lazy_orbax
from benchmarks import meters
from benchmarks.in_processes import parser_of, tell

_LEAVES = 32
_KINDS = ("state", "params", "params in bfloat16")


def main() -> None:
    parser = parser_of(__doc__, repeats=10)
    parser.add_argument("--mib", type=int, default=64, help="of the parameters")
    arguments = parser.parse_args()
    size = arguments.mib * 2**20 // 4 // _LEAVES
    params = {f"w{i}": jnp.full(size, i, jnp.float32) for i in range(_LEAVES)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = {"params": params, "mu": zeros, "nu": jax.tree.map(jnp.copy, zeros)}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        for number in range(arguments.repeats + 2):
            for kind in _KINDS:
                directory = pathlib.Path(place) / f"{kind}-{number}"
                state, sample = _sample(kind, directory, state, step)
                if number > 1:  # What is compiled once, and started, is nobody's save.
                    found[kind].append(sample)
    for kind, samples in found.items():
        record: dict[str, Any] = {"part": "dense_params", "kind": kind, "params_mib": arguments.mib}
        for name in samples[0]:
            record[name] = statistics.median(sample[name] for sample in samples)
        record["n"] = len(samples)
        tell(record, arguments)


def _sample(
    kind: str, directory: pathlib.Path, state: Any, step: Any
) -> tuple[Any, dict[str, float]]:
    quiet = []
    for _ in range(5):
        begin_s = time.perf_counter()
        state = jax.block_until_ready(step(state))
        quiet.append(time.perf_counter() - begin_s)
    checkpointer = _CHECKPOINTERS[kind]
    cpu_s, begin_s = time.process_time(), time.perf_counter()
    item = state
    if kind != "state":
        item = lazy_orbax.params_of(state, jnp.bfloat16 if "bfloat16" in kind else None)
    checkpointer.save(directory, args=ocp.args.StandardSave(item))
    saved_s = time.perf_counter()
    del item
    state = jax.block_until_ready(step(state))
    stepped_s = time.perf_counter()
    checkpointer.wait_until_finished()
    return state, {
        "save_s": saved_s - begin_s,
        "added_s": stepped_s - begin_s - statistics.median(quiet),
        "committed_s": time.perf_counter() - begin_s,
        "cpu_s": time.process_time() - cpu_s,
        "disk_bytes": meters.disk_bytes(directory),
    }


_CHECKPOINTERS = {kind: ocp.AsyncCheckpointer(lazy_orbax.standard_handler()) for kind in _KINDS}


if __name__ == "__main__":
    main()
