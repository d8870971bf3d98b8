"""A merge of two checkpoints against reading their files: speed, and memory that it takes.

    python -m benchmarks.merge --directory DIRECTORY --mib 1024 --repeats 5 --out FILE

Each sample is a process of its own, with the sources out of the page cache; reads and merges take
turns. `raw read` reads the files of both sources in 4 threads into memory that nobody used before;
`raw read, write` does that, and then writes and syncs as many bytes as the result has.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

from benchmarks.in_processes import parser_of, sample_of, tell

_CASES = {
    "float32, OCDBT": ("float32", {}),
    "float32, Zarr 3 files": ("float32", {"use_ocdbt": False, "use_zarr3": True}),
    "bfloat16, OCDBT": ("bfloat16", {}),
    "float32, zstd": ("float32", {"use_compression": True}),
}
_SOURCES = ("1", "2")
_KINDS = ("raw read", "raw read, write", "merge")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="of each of the two sources")
    parser.add_argument("--leaf-mib", type=int, default=64)
    parser.add_argument("--cases", nargs="*", default=list(_CASES), choices=list(_CASES))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_sample(*arguments.child)))
        return
    for case in arguments.cases:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
            _make(pathlib.Path(place), case, arguments.mib, arguments.leaf_mib)
            found = {kind: [] for kind in _KINDS}
            for _ in range(arguments.repeats):
                for kind in _KINDS:
                    found[kind].append(sample_of("merge", "--child", kind, place))
        for record in _records(case, found):
            record |= {"source_mib": arguments.mib, "leaf_mib": arguments.leaf_mib}
            tell(record, arguments)


def _make(place: pathlib.Path, case: str, mib: int, leaf_mib: int) -> None:
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    import lazy_orbax

    dtype, keywords = _CASES[case]
    n, size = mib // leaf_mib, leaf_mib * 2**20 // jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    for name in _SOURCES:
        some = [rng.standard_normal(size, np.float32).astype(jnp.dtype(dtype)) for _ in range(n)]
        state = {f"w{i}": jnp.asarray(one) for i, one in enumerate(some)}
        checkpointer = ocp.Checkpointer(lazy_orbax.pytree_handler(**keywords))
        checkpointer.save(place / name, args=ocp.args.PyTreeSave(state))


def _sample(kind: str, place: str) -> dict[str, float]:
    from benchmarks import meters
    from benchmarks.restore import page_cache, plain_read

    root = pathlib.Path(place)
    files = [file for name in _SOURCES for file in (root / name).rglob("*") if file.is_file()]
    n_bytes = sum(file.stat().st_size for file in files)
    read = plain_read.reader("raw_4", files)
    from lazy_orbax.combine.merge import merge

    meters.release_free_memory()
    base_bytes = meters.rss_bytes()
    left_bytes = page_cache.evict(files)
    counts = meters.reset_kernel_peak()
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    if kind == "merge":
        merge([root / name for name in _SOURCES], [0.25, 0.75], root / "merged")
    else:
        memory = read()
        if "write" in kind:
            _write(root / "merged", memoryview(memory)[: n_bytes // len(_SOURCES)])
    found = {
        "s": time.perf_counter() - begin_s,
        "cpu_s": time.process_time() - cpu_s,
        "bytes": n_bytes,
        "cached_bytes": left_bytes,
        "peak_bytes": meters.kernel_peak_bytes() - base_bytes if counts else 0,
    }
    shutil.rmtree(root / "merged", ignore_errors=True)
    return found


def _write(directory: pathlib.Path, content: memoryview) -> None:
    directory.mkdir()
    with (directory / "all").open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def _records(case: str, found: dict[str, list[dict[str, float]]]) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for kind, samples in found.items():
        times = [sample["s"] for sample in samples]
        record = {
            "part": "merge",
            "case": case,
            "kind": kind,
            "median_s": statistics.median(times),
            "least_s": min(times),
            "most_s": max(times),
            "cpu_s": statistics.median(sample["cpu_s"] for sample in samples),
            "gb_per_s": samples[0]["bytes"] / statistics.median(times) / 1e9,
            "peak_mib": max(sample["peak_bytes"] for sample in samples) / 2**20,
            "cached_bytes": max(sample["cached_bytes"] for sample in samples),
            "n": len(samples),
        }
        records.append(record)
    *raw, merged = (found[kind] for kind in _KINDS)
    for kind, samples in zip(_KINDS, raw):
        ratios = [one["s"] / other["s"] for one, other in zip(samples, merged, strict=True)]
        records[-1][f"of {kind}"] = statistics.median(ratios)
    return records


if __name__ == "__main__":
    main()
