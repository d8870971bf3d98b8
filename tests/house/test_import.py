"""Importing lazy_orbax changes nothing in Orbax, in JAX, or in this process."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]

SCRIPT = """
    import logging, sys, threading, types, warnings
    import jax
    import orbax.checkpoint as ocp
    import orbax.checkpoint.checkpoint_args as checkpoint_args
    from orbax.checkpoint import future  # What lazy_orbax imports, so that it is there before.
    from orbax.checkpoint._src.handlers import handler_type_registry
    from orbax.checkpoint._src.serialization import type_handler_registry

    LOGGERS = (None, "absl", "jax", "lazy_orbax")
    kept = []  # Ids are compared: nothing that was seen may be replaced at the same address.

    def names_in(scope, whole):
        found = {}
        for name, value in list(vars(whole).items()):
            if isinstance(value, types.ModuleType) or name in ("__dict__", "__weakref__"):
                continue  # A module gains its submodules as attributes when they are imported.
            kept.append(value)
            found[f"{scope}.{name}"] = id(value)
            if isinstance(value, type) and value.__module__.startswith("orbax"):
                for attribute, inner in list(vars(value).items()):
                    kept.append(inner)
                    found[f"{scope}.{name}.{attribute}"] = id(inner)
        return found

    def attributes():
        found = {}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "orbax":
                found.update(names_in(name, module))
        return found

    def registries():
        types_ = type_handler_registry.GLOBAL_TYPE_HANDLER_REGISTRY
        return {
            "type handlers": [
                (ty.__name__, id(types_.get(ty)))
                for ty in (jax.Array, int, float, bytes, str, __import__("numpy").ndarray)
            ],
            "type handler entries": [
                [id(part) for part in entry] for entry in types_._type_registry
            ],
            "configuration": sorted((n, repr(value)) for n, value in jax.config.values.items()),
            "warnings": list(warnings.filters),
            "log handlers": [list(logging.getLogger(n).handlers) for n in LOGGERS],
            "log levels": [logging.getLogger(n).level for n in LOGGERS],
            "threads": [t.name for t in threading.enumerate()],
            "save args": dict(checkpoint_args._SAVE_ARG_TO_HANDLER),
            "restore args": dict(checkpoint_args._RESTORE_ARG_TO_HANDLER),
            "handler types": dict(handler_type_registry._GLOBAL_HANDLER_TYPE_REGISTRY._registry),
        }

    # Classes cache what they computed from themselves; let Orbax do that first.
    ocp.PyTreeCheckpointHandler(), ocp.StandardCheckpointHandler()
    attributes_before, before = attributes(), registries()
    import lazy_orbax
    assert lazy_orbax.args.LazySave  # A name is imported when it is asked for.
    for name in [*lazy_orbax.__all__, *lazy_orbax.reports.__all__]:
        assert getattr(lazy_orbax, name, None) or getattr(lazy_orbax.reports, name)
    attributes_after, after = attributes(), registries()

    changed = {n for n, i in attributes_before.items() if attributes_after.get(n) != i}
    assert not changed, f"replaced in Orbax: {sorted(changed)}"

    added = {n for n in attributes_after if n not in attributes_before}
    added = {n for n in added if "lazy" in n.lower()}
    assert not added, f"put into Orbax: {sorted(added)}"

    for what in ("save args", "restore args", "handler types"):
        for key, value in before[what].items():
            assert after[what].pop(key) is value, (what, key)
        # Ours alone are new, under names of our own: that is how args find their handler.
        for key, value in after.pop(what).items():
            assert value is lazy_orbax.LazyCheckpointHandler, (what, key, value)
            assert "lazy" in str(key).lower(), (what, key)
        del before[what]
    for what, value in before.items():
        assert after[what] == value, what

    sys.stdout.write("unchanged")
"""


WITHOUT_JAX = """
    import sys
    import lazy_orbax
    import lazy_orbax.integrity.verify
    from lazy_orbax import LazyOptions, SaveTimeline, errors
    assert "verify" in dir(lazy_orbax) and lazy_orbax.verify.__name__ == "verify"
    try:
        lazy_orbax.no_such_name
    except AttributeError as error:
        assert "no_such_name" in str(error)
    foreign = {"jax", "orbax", "etils"} & set(sys.modules)
    assert not foreign, foreign
    sys.stdout.write("unchanged")
"""


@pytest.mark.parametrize("script", [SCRIPT, WITHOUT_JAX], ids=["changes nothing", "needs no JAX"])
def test_importing(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "unchanged"
