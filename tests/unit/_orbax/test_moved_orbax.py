"""An Orbax whose API has moved to `orbax.checkpoint.v0`, as 1.0 will have it: saves stay lazy."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[3]
INSTALLED = pathlib.Path(ocp.__file__).parent

SCRIPT = """
    import sys, tempfile, warnings
    import numpy as np
    import jax
    import orbax.checkpoint
    import orbax.checkpoint.v0 as v0

    assert not hasattr(orbax.checkpoint, "CheckpointManager"), "the top level is not to be v0"
    warnings.simplefilter("error")
    import lazy_orbax
    from lazy_orbax._orbax import symbols
    from lazy_orbax.errors import StockFallbackWarning
    warnings.simplefilter("default")
    warnings.simplefilter("error", StockFallbackWarning)

    assert symbols.MISSING == [], symbols.MISSING
    assert symbols.ocp is v0
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    wanted = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    state = {"w": jax.device_put(wanted, sharding), "n": np.arange(3)}
    timelines = []
    handler = lazy_orbax.standard_handler(
        options=lazy_orbax.LazyOptions(mode="stage", on_timeline=timelines.append)
    )
    assert isinstance(handler, v0.StandardCheckpointHandler)
    directory = tempfile.mkdtemp()
    with v0.CheckpointManager(directory, item_handlers=handler) as manager:
        manager.save(1, args=v0.args.StandardSave(state))
        manager.wait_until_finished()
        found = manager.restore(1, args=v0.args.StandardRestore())
        np.testing.assert_array_equal(np.asarray(found["w"]), wanted)
    (timeline,) = timelines
    assert timeline.mode == "stage" and timeline.committed_s is not None, timeline
    assert lazy_orbax.verify(directory).ok
    with v0.CheckpointManager(directory) as manager:
        found = manager.restore(1, args=v0.args.StandardRestore())
        np.testing.assert_array_equal(np.asarray(found["w"]), wanted)
    loaded = {name for name in sys.modules if name.startswith("orbax.checkpoint.")}
    assert not [name for name in loaded if not name.startswith("orbax.checkpoint.v0")], loaded
    sys.stdout.write("lazy")
"""


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A copy of the installed Orbax in which everything is below `orbax.checkpoint.v0`."""
    root = tmp_path_factory.mktemp("moved")
    for source in INSTALLED.rglob("*.py"):
        target = root / "orbax" / "checkpoint" / "v0" / source.relative_to(INSTALLED)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"\borbax\.checkpoint\b", "orbax.checkpoint.v0", source.read_text())
        target.write_text(
            text.replace("from orbax import checkpoint", "from orbax.checkpoint import v0")
        )
    (root / "orbax" / "checkpoint" / "__init__.py").write_text('__version__ = "1.0.0"\n')
    return root


def test_where_the_api_has_moved_saves_are_lazy(moved):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "PYTHONPATH": f"{moved}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "lazy"
