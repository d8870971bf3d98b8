"""What is measured comes under Orbax's own names, where Orbax's exporters look."""

import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment.trees import on_mesh

import lazy_orbax
from lazy_orbax.errors import SaveError
from lazy_orbax.save.writer import Writer

# What stock Orbax measures of steps that a lazy save does not have, or that are not timed alone:
# how its arrays are cut, TensorStore's own counters of what went over the wire, one metadata file.
NOT_OURS = {
    f"/jax/orbax/write/{name}"
    for name in (
        "replicated_array_gb",
        "sharded_array_gb",
        "background_meta_write_secs",
        "worker/io/compression_ratio",
        "worker/io/raw/gbytes",
        "worker/io/raw/throughput/gbytes_per_sec",
    )
}
OURS = {
    f"/jax/orbax/write/lazy_{name}"
    for name in (
        "staged_secs",
        "durable_secs",
        "committed_secs",
        "waited_for_room_secs",
        "host_peak_gbytes",
    )
}


@pytest.fixture
def recorded():
    """Names and values of all that is recorded below Orbax's prefixes."""
    found = {}

    def note(event, value=1, **_):
        if event.startswith(("/jax/orbax/write/", "/jax/orbax/read/")):
            found.setdefault(event, []).append(value)

    monitoring = jax.monitoring
    monitoring.register_event_listener(note)
    monitoring.register_scalar_listener(note)
    monitoring.register_event_duration_secs_listener(note)
    yield found
    monitoring.unregister_event_listener(note)
    monitoring.unregister_scalar_listener(note)
    monitoring.unregister_event_duration_listener(note)


def save(directory, tree, handler):
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))


def test_a_lazy_save_records_what_a_stock_save_does_and_its_own_moments(tmp_path, mesh, recorded):
    tree = {"w": on_mesh(np.zeros((1024, 1024), np.float32), mesh, "a")}
    save(tmp_path / "stock", tree, ocp.StandardCheckpointHandler())
    stock = set(recorded)
    recorded.clear()
    save(tmp_path / "lazy", tree, lazy_orbax.standard_handler())
    assert stock - set(recorded) - NOT_OURS == set()
    assert set(recorded) - stock >= OURS
    moments = [recorded[f"/jax/orbax/write/lazy_{m}_secs"][0] for m in ("staged", "durable")]
    assert 0 < moments[0] < moments[1] < recorded["/jax/orbax/write/lazy_committed_secs"][0]
    assert recorded["/jax/orbax/write/gbytes"] == [2**22 / 2**30]
    assert recorded["/jax/orbax/write/blocking_tree_map_duration_secs"][0] > 0


def test_a_save_that_failed_is_recorded_as_such(tmp_path, recorded, monkeypatch):
    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(Writer, "write", refuse)
    with pytest.raises(SaveError):
        save(tmp_path, {"w": np.zeros(3)}, lazy_orbax.standard_handler())
    assert recorded["/jax/orbax/write/lazy_failed"] == [1]
    assert "/jax/orbax/write/lazy_durable_secs" not in recorded


def test_a_listener_that_raises_fails_no_save(tmp_path, caplog):
    def refuse(event, *_, **__):
        if event.startswith("/jax/orbax/write/lazy_") or "blocking_tree_map" in event:
            raise ValueError("a listener")

    jax.monitoring.register_event_duration_secs_listener(refuse)
    try:
        save(tmp_path, {"w": np.zeros(3)}, lazy_orbax.standard_handler())
    finally:
        jax.monitoring.unregister_event_duration_listener(refuse)
    assert (tmp_path / "0").is_dir()
    assert "A listener of jax.monitoring raised" in caplog.text


SCRAPED = """
import socket, sys, urllib.request
import os
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ["ORBAX_PROMETHEUS_PORT"] = str(port)
import numpy as np
import orbax.checkpoint as ocp
import lazy_orbax
with ocp.CheckpointManager(sys.argv[1], item_handlers=lazy_orbax.standard_handler()) as manager:
    manager.save(0, args=ocp.args.StandardSave({"x": np.arange(4.0)}))
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
"""


def test_the_exporter_of_orbax_ships_ours_next_to_its_own(tmp_path):
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    environment = {**os.environ, "ENABLE_ORBAX_PROMETHEUS_TELEMETRY": "true"}
    command = [sys.executable, "-c", SCRAPED, str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("lazy_staged_secs", "lazy_committed_secs", "blocking_tree_map_duration_secs"):
        assert f"jax_orbax_write_{name}_count 1.0" in done.stdout
    assert "jax_orbax_write_success_total" in done.stdout
