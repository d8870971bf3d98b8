"""An Orbax that lacks a symbol we need: saves are stock saves, with a warning."""

import importlib
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from lazy_orbax import errors
from lazy_orbax._orbax import standard_handler, symbols

ROOT = pathlib.Path(__file__).parents[3]

SCRIPT = """
    import importlib, pathlib, sys, tempfile, warnings
    import numpy as np
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    module_name, symbol = sys.argv[1:]
    module = importlib.import_module(f"orbax.checkpoint._src.{module_name}")
    taken = getattr(module, symbol)
    delattr(module, symbol)
    warnings.simplefilter("error")
    import lazy_orbax
    from lazy_orbax import errors
    from lazy_orbax._orbax import symbols
    # Orbax itself still needs it: in a release without it nothing of Orbax would ask for it.
    setattr(module, symbol, taken)
    warnings.simplefilter("default")

    assert symbols.MISSING == [f"orbax.checkpoint._src.{module_name}.{symbol}"], symbols.MISSING

    def warned(make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            handler = make()
        caught = [w for w in caught if w.category is symbols.StockFallbackWarning]
        assert caught, f"{make} did not warn"
        for warning in caught:
            assert symbol in str(warning.message)
            assert ocp.__version__ in str(warning.message)
        return handler

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    wanted = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    state = {"w": jax.device_put(wanted, sharding), "n": np.arange(3)}
    options = lazy_orbax.LazyOptions(mode="stage", host_bytes=2**20)
    knobs = dict(
        options=options, use_ocdbt=False, restore_concurrent_gb=1, save_concurrent_gb=1
    )
    cases = [
        (lazy_orbax.pytree_handler, {"aggregate_filename": "x"}, ocp.PyTreeCheckpointHandler,
         ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
        (lazy_orbax.standard_handler, {}, ocp.StandardCheckpointHandler,
         ocp.args.StandardSave, ocp.args.StandardRestore),
        (lazy_orbax.LazyCheckpointHandler, {}, lazy_orbax.LazyCheckpointHandler,
         lazy_orbax.args.LazySave, lazy_orbax.args.LazyRestore),
    ]
    for make, more, type_, save, restore in cases:
        for kwargs in ({}, {**knobs, **more}, {"use_compression": True, "use_zarr3": True}):
            directory = tempfile.mkdtemp()
            handler = warned(lambda: make(**kwargs))
            assert isinstance(handler, type_), handler
            with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
                for step in (1, 2):
                    assert manager.save(step, args=save(state))
                manager.wait_until_finished()
                lazy_orbax.wait_until_staged()
                found = manager.restore(2, args=restore())
                np.testing.assert_array_equal(np.asarray(found["w"]), wanted)
                np.testing.assert_array_equal(found["n"], [0, 1, 2])
                target = {"w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding),
                          "n": np.zeros(3, int)}
                np.testing.assert_array_equal(
                    np.asarray(manager.restore(1, args=restore(target))["w"]), wanted
                )
                assert manager.all_steps() == [1, 2]
            # A process that does not know us reads it.
            with ocp.CheckpointManager(directory) as manager:
                found = manager.restore(2, args=ocp.args.StandardRestore())
                np.testing.assert_array_equal(np.asarray(found["w"]), wanted)
            # What is malformed is refused as ever.
            (tree,) = pathlib.Path(directory).glob("1/*/_METADATA")
            tree.write_text("[]")
            try:
                handler.restore(epath.Path(tree.parent), args=restore())
            except errors.MalformedCheckpointError as error:
                assert str(tree) in str(error)
            else:
                raise AssertionError("a malformed checkpoint was restored")
            handler.close()
            handler.close()
    sys.stdout.write("restored")
"""


@pytest.mark.parametrize(
    "key",
    [
        "base",  # What the lazy handler inherits from.
        "build_array_write_spec",
        "build_kvstore_tspec",  # What a checkpoint that is restored is read by.
        "is_empty_or_leaf",
    ],
)
def test_without_a_symbol_saves_are_stock_saves(key):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *symbols._NEEDED[key]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "restored"


@pytest.mark.parametrize("key", symbols._NEEDED)
def test_every_symbol_is_probed(key, monkeypatch):
    module, symbol = symbols._NEEDED[key]
    name = f"orbax.checkpoint._src.{module}"
    monkeypatch.delattr(importlib.import_module(name), symbol)
    found, missing = symbols.probe(symbols.ocp.__name__, symbols._NEEDED)
    assert missing == [f"{name}.{symbol}"]
    assert set(found) == set(symbols._NEEDED) - {key}


def test_a_module_that_is_gone_is_missing_too(monkeypatch):
    monkeypatch.setitem(symbols._NEEDED, "gone", ("no.such.module", "Symbol"))
    assert symbols.probe(symbols.ocp.__name__, symbols._NEEDED)[1] == [
        "orbax.checkpoint._src.no.such.module.Symbol"
    ]


def test_with_the_orbax_that_is_installed_nothing_is_missing():
    assert symbols.MISSING == []
    assert not symbols.warn_if_stock()  # A warning would be an error here.


def test_a_standard_handler_that_cannot_be_filled_says_so():
    class WithoutImpl:
        pass

    with pytest.warns(errors.StockFallbackWarning, match="StandardCheckpointHandler._impl"):
        standard_handler.put_inside_standard_handler(WithoutImpl(), None)
