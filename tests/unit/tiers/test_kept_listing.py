"""What is in memory can be seen, and removed; looking makes nothing and imports no JAX."""

import json
import os
import select
import signal
import subprocess
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.cli.main import main
from lazy_orbax.tiers.kept_listing import kept, left_in_memory, stop


@pytest.fixture
def two(served, tmp_path):
    """A directory with two snapshots, one of them damaged."""
    keeper = lazy_orbax.Keeper(tmp_path, directory=served)
    for step in (1, 2):
        keeper.save(step, {"a": jnp.arange(4.0)})
        keeper.wait()
    with open(keeper.slots.shelf.path_of(keeper.slots.files(["default"])[0]), "r+b") as file:
        file.write(b"torn")
    keeper.close(discard=False)
    return served


def test_each_snapshot_is_listed_with_what_is_wrong(two, tmp_path, capsys):
    assert main(["keeper", "--directory", two, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pid"] == os.getpid()
    whole, torn = sorted(found["snapshots"], key=lambda one: one["problem"] is not None)
    assert (whole["run"], whole["item"], whole["process"]) == (str(tmp_path), "default", 0)
    assert whole["problem"] is None
    assert "torn" in torn["problem"]
    assert main(["keeper", "--directory", two]) == 0
    assert "whole" in capsys.readouterr().out


def test_each_tier_is_listed_with_how_it_went(served, tmp_path, capsys):
    tiers = [lazy_orbax.Tier(tmp_path / name, every_s=1e6) for name in "abcd"]
    with lazy_orbax.Keeper(tmp_path / "run", directory=served, tiers=tiers):
        found = kept(served)
    assert [one["path"] for one in found.tiers] == [tier.path for tier in tiers]
    for one, (status, is_busy) in zip(
        found.tiers, [(None, False), (None, True), (0, False), (1, False)], strict=True
    ):
        one.update(status=status, is_busy=is_busy)
    *_, a, b, c, d = str(found).splitlines()
    assert a == f"{tmp_path}/run to {tmp_path}/a: nothing yet"
    assert b.endswith("on its way")
    assert c.endswith("the newest is there")
    assert d.endswith(f"failed, see {served}/keeper.log")


def test_looking_makes_nothing(place, capsys):
    assert kept(place).snapshots == ()
    assert not stop(place, discard=True)
    assert main(["keeper", "--directory", place]) == 0
    assert "no keeper" in capsys.readouterr().out
    assert not os.path.exists(place)


def test_what_a_crash_left_is_found_named_and_removed_by_clean(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lazy_orbax.tiers.kept_listing.place_for", lambda _: two)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave({"a": jnp.ones(2)}))
    assert main(["clean", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["directories"]
    assert found["path"].startswith(two)
    assert f"keeper {os.getpid()} removes it" in found["kept"]
    stop(two, discard=False)
    (young,) = left_in_memory(str(tmp_path), dry_run=False)
    assert (young.removed, young.kept) == (False, "it was written just now")
    assert left_in_memory("/another/run", dry_run=False, quiet_s=0) == ()
    assert main(["clean", str(tmp_path), "--remove", "--quiet-minutes", "0"]) == 0
    assert not os.path.exists(found["path"])
    assert not stop(two, discard=True)
    assert not os.path.exists(two)


def test_a_keeper_is_started_and_ended_by_hand_and_nobody_needs_jax_for_it(place):
    script = (
        "import sys; from lazy_orbax.cli.main import main\n"
        "status = main(['keeper', '--start', '--json', '--directory', sys.argv[1]])\n"
        "assert not {'jax', 'orbax'} & set(sys.modules)\n"
        "raise SystemExit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, place], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pid = json.loads(done.stdout)["pid"]
    assert kept(place).pid == pid
    os.kill(pid, signal.SIGTERM)
    descriptor = os.pidfd_open(pid)
    assert select.select([descriptor], [], [], 60)[0]
    os.close(descriptor)
    assert kept(place).pid is None
    assert stop(place, discard=True) is False


def test_options_that_do_not_go_together_are_refused(place):
    assert main(["keeper", "--start", "--stop", "--directory", place]) == 2
    assert main(["keeper", "--discard", "--directory", place]) == 2
