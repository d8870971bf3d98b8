"""What verified snapshots cost: CPU seconds and added loop time, with and without, in turns.

python -m benchmarks.proof --directory /tmp/x --repeats 5
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import argparse
import json
import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lazy_orbax

STEPS, STEP_S = 20, 0.05


def main() -> None:
    """Measures and prints JSON lines, one for each workload and peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", required=True, type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS))
    arguments = parser.parse_args()
    for name in arguments.workloads:
        measure(name, arguments.directory, arguments.repeats)


def measure(workload: str, directory: pathlib.Path, repeats: int) -> None:
    """Measures saves that are verified, and that are not, in turns."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    state = WORKLOADS[workload](NamedSharding(mesh, PartitionSpec("d")))
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    found: dict[str, list[tuple[float, ...]]] = {"never": [], "always": []}
    state = loop(step, state, None)[0]
    for i in range(repeats + 1):
        for peer, every in (("never", 0), ("always", 1))[:: 1 if i % 2 else -1]:
            place = directory / f"{workload}_{peer}_{i}"
            options = lazy_orbax.LazyOptions(verify_snapshot=every)
            handler = lazy_orbax.standard_handler(options=options)
            with ocp.CheckpointManager(place, item_handlers=handler) as manager:
                state, *_ = loop(step, state, None)
                cpu_s = time.process_time()
                state, loop_s, save_s = loop(step, state, manager)
                manager.wait_until_finished()
                cpu_s = time.process_time() - cpu_s
            base_cpu_s = time.process_time()
            state, base_s, _ = loop(step, state, None)
            cpu_s -= time.process_time() - base_cpu_s
            if i:  # The first one warms up.
                found[peer].append((cpu_s, loop_s - base_s, save_s))
            shutil.rmtree(place)
            os.sync()
    for peer, rows in found.items():
        columns = dict(
            zip(("cpu_s", "added_loop_s", "save_s"), zip(*rows, strict=True), strict=True)
        )
        told = {"workload": workload, "verified": peer, "bytes": n_bytes}
        told |= {key: statistics.median(values) for key, values in columns.items()}
        told |= {f"{key}_all": [round(v, 4) for v in values] for key, values in columns.items()}
        print(json.dumps(told), flush=True)
    extra = statistics.median(
        a[0] - b[0] for a, b in zip(found["always"], found["never"], strict=True)
    )
    base = statistics.median(row[0] for row in found["never"])
    print(
        json.dumps(
            {
                "workload": workload,
                "extra_cpu": extra / base,
                "n_for_2_percent": extra / base / 0.02,
            }
        )
    )


def loop(step: Any, state: Any, manager: Any) -> tuple[Any, float, float]:
    """Runs steps of which the accelerator's part is emulated by sleep; saves the first."""
    begin, save_s = time.perf_counter(), 0.0
    for i in range(STEPS):
        state = jax.block_until_ready(step(state))
        if manager is not None and i == 0:
            save_s = -time.perf_counter()
            manager.save(i, args=ocp.args.StandardSave(state))
            save_s += time.perf_counter()
        time.sleep(STEP_S)
    return state, time.perf_counter() - begin, save_s


def _many(sharding: Any) -> Any:
    return {f"a{i}": jax.device_put(jnp.full((256, 256), i, "f4"), sharding) for i in range(1000)}


def _few(sharding: Any) -> Any:
    return {f"a{i}": jax.device_put(jnp.full((4096, 4096), i, "f4"), sharding) for i in range(8)}


def _half(sharding: Any) -> Any:
    return {
        f"a{i}": jax.device_put(jnp.full((4096, 4096), i, "bfloat16"), sharding) for i in range(12)
    }


WORKLOADS = {"many_small": _many, "few_large": _few, "bfloat16": _half}


if __name__ == "__main__":
    main()
