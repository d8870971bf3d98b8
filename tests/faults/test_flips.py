"""A flipped bit in every kind of file: named, or harmless. Never other numbers."""

import collections
import gc
import logging
import random

import jax
import numpy as np
import pytest
from equipment.trees import assert_same
from faults import flips
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.errors import CorruptCheckpointError, LazyOrbaxError
from lazy_orbax.transforms import TransformMap, cast, drop, pad_to, rename

pytestmark = [
    # What Orbax leaves behind when it fails in the middle of a restore.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# What Orbax keeps beside the item, and our digests of it: it may be changed on purpose.
# The form that is used most, and the one that shares least with it; the others at night.
BY_DAY = ("ocdbt-zarr2", "plain-zarr3-zstd")
BESIDE = ("_CHECKPOINT_METADATA", "lazy_orbax_digests/step")


@pytest.fixture(autouse=True)
def forget_what_orbax_left():
    """What a restore of Orbax leaves when it fails in the middle is collected in this test.

    asyncio logs it with the whole traceback, which pytest would keep.
    """
    logger = logging.getLogger("asyncio")
    logger.disabled = True
    yield
    gc.collect()
    logger.disabled = False


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=() if form in BY_DAY else pytest.mark.slow) for form in flips.FORMS],
)
def test_a_flipped_bit_is_named_or_harmless(tmp_path, mesh, form, record_property):
    saved = flips.save(tmp_path / "run", form, mesh)
    assert_same(saved.restore(), saved.value)
    wanted = {name: load() for name, load in ways_to_load(saved).items()}
    report = lazy_orbax.verify(saved.directory)
    assert report.is_whole
    assert report.items[0].n_leaves == len(saved.value)
    rng = random.Random(form)
    kinds = saved.files()
    assert {"_METADATA", "_sharding", "lazy_orbax_digests/process_0"} <= set(kinds)
    for kind, files in kinds.items():
        outcomes = collections.Counter()
        for file, at in flips.positions(files, rng):
            bit = rng.randrange(8)
            with flips.flipped(file, at, bit):
                outcomes[outcome(saved, kind, file)] += 1
                loaded_rightly_or_refused(saved, wanted, rng.choice(list(wanted)))
        gc.collect()
        row = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
        record_property("table row", ["Flipped bits", form, kind, row])
        if kind == "lazy_orbax_digests/step":
            assert set(outcomes) == {"detected by verify; restored rightly"}
        elif kind.startswith(("_METADATA", "_sharding", "array_metadatas", "lazy_orbax_digests")):
            assert set(outcomes) == {"detected"}, kind
        if kind == "chunk":
            assert set(outcomes) <= {"detected", "harmless (a byte that does not count)"}
            assert outcomes["detected"] > len(outcomes)


def ways_to_load(saved):
    """Returns what reads the step without a handler: all of it, onto another mesh, transformed."""
    directory = saved.directory / "1" / "default"
    arrays = {
        name: jax.ShapeDtypeStruct(saved.value[name].shape, saved.value[name].dtype)
        for name in ("large", "half", "small")
    }
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    rules = TransformMap(
        [
            rename("(large|half)", r"new.\1"),
            cast(r"new\.half", np.float32),
            pad_to(r"new\.large", (130, 64)),
            drop("small|key|host|number"),
        ]
    )
    new = {
        "large": jax.ShapeDtypeStruct((130, 64), np.float32),
        "half": jax.ShapeDtypeStruct((32, 48), np.float32),
    }
    return {
        "numpy": lambda: lazy_orbax.load(directory),
        "mesh": lambda: lazy_orbax.load(
            directory,
            arrays,
            mesh=mesh,
            rule=lambda name, shape: P(None, "x") if shape[1:] else P(),
        ),
        "transformed": lambda: lazy_orbax.load(directory, {"new": new}, transforms=rules),
    }


def loaded_rightly_or_refused(saved, wanted, way):
    try:
        found = ways_to_load(saved)[way]()
    except LazyOrbaxError as error:
        forget_frames(error)
    else:
        assert_same(found, wanted[way])


def forget_frames(error):
    """Lets go of what Orbax left behind, now and not in whatever test comes later."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def outcome(saved, kind, file):
    """Restores and verifies a step with a flipped bit. Returns what came of it."""
    report = lazy_orbax.verify(saved.directory)
    try:
        found = saved.restore()
    except CorruptCheckpointError as error:
        forget_frames(error)
        assert not report.ok
        relative = str(file.relative_to(saved.directory / "1" / "default"))
        named = " ".join(str(problem.file) for problem in error.problems)
        assert relative in named or relative in str(error), f"{relative} is not named: {error}"
        return "detected"
    except Exception as error:
        forget_frames(error)
        if kind not in BESIDE:
            raise
        return "an error of Orbax"
    assert_same(found, saved.value)
    if kind in BESIDE and not report.ok:
        return "detected by verify; restored rightly"
    assert report.ok, str(report)
    return "harmless (a byte that does not count)"
