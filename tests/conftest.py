"""What every test shares: eight emulated devices, meshes, and the state of the process after."""

from __future__ import annotations

import os

# Before jax is imported: eight CPU devices, so that sharding is real.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import gc
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings

from lazy_orbax.save.plan_cache import PLAN_CACHE
from lazy_orbax.snapshot import choose_mode
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage.threads import dismiss_idle

# Here, where pytest finds them wherever it starts; `--hypothesis-profile=nightly` takes the other.
settings.register_profile("lazy_orbax", deadline=None, max_examples=50, database=None)
settings.register_profile(
    "nightly", deadline=None, max_examples=3000, database=None, print_blob=True
)
settings.load_profile("lazy_orbax")


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """What is alive before a module of tests is not looked at again in each of its collections.

    It is modules, tests that were collected, and programs of JAX: a million objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """Eight devices as 4 x 2, axes a and b."""
    return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """After each test no host memory is reserved and none of our threads is alive."""
    PLAN_CACHE.clear()
    yield
    dismiss_idle()
    for thread in threading.enumerate():
        if thread.name.startswith("lazy_orbax"):
            threading.Thread.join(thread, 30)  # Orbax overrides join: it raises what failed.
            assert not thread.is_alive(), f"{thread.name} is still running"
    assert HOST_BUDGET.in_flight_bytes == 0
    HOST_BUDGET.drop_idle()


@pytest.fixture
def copying_first() -> None:
    """The first save of a tree copies on CPU, and its programs are compiled for the next ones."""


@pytest.fixture(autouse=True)
def compiling_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save stages, for else whether one does depends on how fast a thread compiles.

    Tests of the first save, which take `copying_first`, and processes that tests start, are as
    users' are.
    """
    if "copying_first" not in request.fixturenames:
        monkeypatch.setattr(choose_mode, "is_compiled", lambda plan, slab: True)


@pytest.fixture(scope="module")
def restores_that_fail() -> Iterator[None]:
    """For modules in which Orbax's restores do: what they leave is collected before other tests.

    pytest would blame the test during which that happens.
    """
    yield
    gc.collect()


@pytest.fixture
def tell(record_property: Any) -> Any:
    """Puts a row into a table that is printed after all tests."""

    def tell(table: str, *cells: str) -> None:
        record_property("table row", [table, *cells])

    return tell


def pytest_terminal_summary(terminalreporter):
    """Prints the tables that tests told of, wherever they ran."""
    tables: dict[str, list[list[str]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    if name == "table row":
                        tables.setdefault(value[0], []).append(value[1:])
    for title, rows in sorted(tables.items()):
        terminalreporter.section(title)
        columns = itertools.zip_longest(*rows, fillvalue="")  # Some rows have less to tell.
        widths = [max(map(len, column)) for column in columns]
        for row in sorted(rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            terminalreporter.write_line("  ".join(cells).rstrip())
