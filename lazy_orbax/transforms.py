r"""Rules for `load` and `LazyRestore`: how wanted leaves are made of stored ones, while reading.

    import lazy_orbax
    from lazy_orbax.transforms import TransformMap, rename, unstack

    rules = TransformMap([rename(r"params\.(.*)", r"model.\1"), unstack(...)])
    state = lazy_orbax.load("run/1000/state", like=abstract_state, transforms=rules)

Names are Orbax's: keys joined by dots. The idea of reading into any layout is that of *Universal
Checkpointing* (Lian et al., 2024).
"""

from lazy_orbax.plan.transforms.rules import (
    cast,
    drop,
    fuse,
    init,
    pad_to,
    rename,
    reshape,
    scale,
    select,
    split,
    stack,
    strip,
    transpose,
    unstack,
)
from lazy_orbax.plan.transforms.transform_map import TransformMap
from lazy_orbax.plan.transforms.transform_plan import TransformPlan

__all__ = [
    "TransformMap",
    "TransformPlan",
    "cast",
    "drop",
    "fuse",
    "init",
    "pad_to",
    "rename",
    "reshape",
    "scale",
    "select",
    "split",
    "stack",
    "strip",
    "transpose",
    "unstack",
]
