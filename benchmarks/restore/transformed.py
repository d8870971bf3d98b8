"""A scanned model into single layers: each has another name, half are cast, one is padded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.restore import states
from benchmarks.restore.cases import WORKLOADS, Reading
from lazy_orbax.transforms import TransformMap, cast, pad_to, rename, unstack

_PADDED = 0
_COLUMNS = 64
"""So many more has the leaf that is padded."""


def rules_of(run: Reading) -> TransformMap:
    shape = WORKLOADS[run.workload].shape(run.size)
    padded = f"model[.]stack_{_PADDED:05}"
    return TransformMap(
        [
            rename(r"leaf_(\d+)", r"model.stack_\1"),
            pad_to(padded, (*shape[:-1], shape[-1] + _COLUMNS)),
            *(cast(f"model[.]stack_{i:05}", jnp.bfloat16) for i in _cast(run)),
            unstack(r"model[.]stack_(\d+)", r"model.layer_{layer}.weight_\1"),
        ]
    )


def _cast(run: Reading) -> range:
    """The numbers of the leaves that are cast."""
    return range(1, WORKLOADS[run.workload].leaves[run.size], 2)


def wanted(run: Reading) -> dict[str, Any]:
    """Returns what to ask for: a dictionary for each layer."""
    workload, sharding = WORKLOADS[run.workload], states.sharding_of(run.target)
    rows, columns = workload.shape(run.size)[1:]
    layer = {}
    for i in range(workload.leaves[run.size]):
        shape = (rows, columns + (_COLUMNS if i == _PADDED else 0))
        dtype = jnp.bfloat16 if i in _cast(run) else jnp.float32
        layer[f"weight_{i:05}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return {"model": {f"layer_{k}": dict(layer) for k in range(workload.layers)}}


def wrong(run: Reading, restored: Any, digests: states.Digests) -> list[str]:
    """Names the leaves that are not what was asked for, or hold other bits on any device."""
    target = wanted(run)
    if jax.tree.map(_kind, restored) != jax.tree.map(_kind, target):
        return ["the kinds of the leaves"]
    found = []
    layers = [restored["model"][name] for name in target["model"]]
    for i in range(WORKLOADS[run.workload].leaves[run.size]):
        name, dtype = f"weight_{i:05}", "bfloat16" if i in _cast(run) else "float32"
        wholes = [states.whole_of(layer[name]) for layer in layers]
        if any(whole is None for whole in wholes):
            found.append(name)
            continue
        stacked = np.stack(wholes)
        if i == _PADDED:
            stacked, padding = np.split(stacked, [stacked.shape[-1] - _COLUMNS], axis=-1)
            found += [f"the padding of {name}"] if padding.any() else []
        if states.digest_of(stacked) != digests[dtype][i]:
            found.append(name)
    return found


def _kind(leaf: Any) -> str:
    return f"{leaf.shape} {leaf.dtype} {leaf.sharding}"
