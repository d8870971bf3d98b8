"""Each example, as a user runs it. They assert what they claim and exit non-zero otherwise."""

import importlib
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["train_lm.py", "--demo", "--steps", "12", "--save-every", "4"],
        ["resume_on_another_mesh.py"],
        ["linen_train_state.py"],
        ["hidden_copy.py"],
        pytest.param(["outlive.py", "--steps", "24", "--processes", "3"], marks=pytest.mark.slow),
        pytest.param(["outlive.py", "--steps", "24", "--machines"], marks=pytest.mark.slow),
        pytest.param(["dense_params.py", "--steps", "24"], marks=pytest.mark.slow),
        pytest.param(
            ["merge_tail.py", "--seeds", "1", "--steps", "60", "--tail", "20", "--every", "5"],
            marks=pytest.mark.slow,
        ),
        ["multihost_train.py", "--demo", "--processes", "2", "--steps", "12", "--save-every", "4"],
    ],
    ids=lambda command: command[0],
)
def test_the_example_holds_what_it_claims(command, tmp_path):
    # The examples choose their own devices.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    name, *flags = command
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, "--directory", tmp_path, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "multihost_train.py":
        assert "resumed from step 8 on 1 processes" in done.stdout
        assert "stock Orbax restores step 12 in one process" in done.stdout
    elif name == "outlive.py":
        assert "24 losses are equal, bit for bit" in done.stdout
        again = done.stdout.count("what process 3 had was made again by 0, 1, 2")
        assert again == (2 if "--machines" in flags else 0)
    elif "--demo" in flags:
        assert "12 losses and the last checkpoint are equal, bit for bit" in done.stdout


@pytest.mark.parametrize("n_processes", range(1, 17))
def test_any_number_of_processes_shares_the_state_and_the_batches(n_processes, monkeypatch):
    """Each of them has two devices. Where these do not divide the rows, each has all of them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("multihost_train")
    n_devices = 2 * n_processes
    monkeypatch.setattr(jax, "device_count", lambda: n_devices)
    mesh = AbstractMesh((n_devices,), ("devices",))
    leaves = jax.tree.leaves(jax.eval_shape(example.init))
    pairs = [(leaf.shape, example.spec_of(leaf)) for leaf in leaves]
    pairs.append(((example.BATCH, example.WIDTH), example.rows_spec(example.BATCH)))
    parts = [NamedSharding(mesh, spec).shard_shape(shape) for shape, spec in pairs]
    split = [part != shape for part, (shape, _) in zip(parts, pairs, strict=True)]
    assert any(split) or n_processes > 6
