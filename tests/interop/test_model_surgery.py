"""Bit for bit what Orbax's transformations in memory make, where it has the same ones."""

import warnings

import numpy as np
import pytest
from equipment.numpy_reader import assert_makes, specs

from lazy_orbax.plan.transforms.rules import fuse, rename, stack
from lazy_orbax.plan.transforms.transform_map import TransformMap

with warnings.catch_warnings():  # It uses what JAX has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from orbax.checkpoint.experimental.model_surgery.transformations import (
        fusing,
        renaming,
        stacking,
    )


def tree():
    """Weights as Hugging Face names them, of two layers with three experts each."""
    random = np.random.default_rng(0)
    leaves = {"model.embed.weight": random.normal(size=(7, 4))}
    for i in range(2):
        layer = f"model.layers.{i}.mlp"
        for name in ("gate_proj", "up_proj"):
            leaves[f"{layer}.{name}.weight"] = random.normal(size=(6, 4))
        for j in range(3):
            leaves[f"{layer}.experts.{j}.weight"] = random.normal(size=(4, 5))
    return {name: array.astype(np.float32) for name, array in leaves.items()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            lambda: renaming.rename_by_regex([(r"^model\.", "params."), ("weight$", "w")]),
            [rename(r"model\.(.*)weight", r"params.\1w")],
        ),
        (
            lambda: stacking.stack(r"mlp\.experts(\.\d+)"),
            [stack(r"(.*\.experts)\.(?P<layer>\d+)(.*)", r"\1\3")],
        ),
        (
            lambda: stacking.stack(r"mlp\.experts(\.\d+)", axis=1),
            [stack(r"(.*\.experts)\.(?P<layer>\d+)(.*)", r"\1\3", 1)],
        ),
        (
            lambda: fusing.fuse_by_pattern(
                pattern=r"^(.*)\.(gate_proj|up_proj)\.weight$",
                unique_parts=["gate_proj", "up_proj"],
                fused_unique_part="gate_up_proj",
                axis=1,
            ),
            [fuse([r"(.*)gate_proj(.*)", r"(.*)up_proj(.*)"], r"\1gate_up_proj\2", 1)],
        ),
    ],
)
def test_transforms_make_what_orbax_makes_in_memory(theirs, ours):
    stored = tree()
    wanted = {name: np.asarray(array) for name, array in theirs()(dict(stored)).items()}
    assert wanted.keys() != stored.keys()
    assert_makes(TransformMap(ours).plan(specs(stored), specs(wanted)), stored, wanted)
