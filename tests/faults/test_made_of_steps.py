"""A merge and an export that are killed, or whose power is cut, at every call they make of disks.

What they make is there as a whole or not at all; once they have returned it is there.
"""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
import pytest
from equipment.trees import all_bits
from faults import crashes

import lazy_orbax
from lazy_orbax.inspect import clean

NO_HEURISTIC = "ext4 noauto_da_alloc"
KINDS = [pytest.param("xfs", marks=pytest.mark.slow), NO_HEURISTIC]
TARGETS = {"merge": "2", "export": "model"}


class Made(NamedTuple):
    """What is made of step 1, under which name, and what is in it where nothing happens."""

    how: str
    target: str
    wanted: Any


@pytest.fixture(params=TARGETS)
def made(request, first_step, tmp_path):
    target = TARGETS[request.param]
    make(request.param, first_step, tmp_path / "whole")
    return Made(request.param, target, content_of(request.param, tmp_path / "whole" / target))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)])
def everywhere(request):
    return request.param


@pytest.fixture(params=KINDS)
def disk(request, tmp_path):
    with crashes.disk_or_skip(tmp_path, request.param) as disk:
        yield disk


def make(how, source, root):
    root.mkdir(exist_ok=True)
    if how == "merge":
        lazy_orbax.merge([source / "1"] * 2, "uniform", root / "2")
    else:
        lazy_orbax.export(source / "1", root / "model", max_shard_bytes=2**20)


def content_of(how, target):
    if how == "export":
        return {path.name: path.read_bytes() for path in target.iterdir()}
    with ocp.CheckpointManager(
        target.parent, item_handlers=ocp.StandardCheckpointHandler()
    ) as stock:
        return all_bits(stock.restore(2))


def check(root, made, calls):
    """The invariants, after `calls` began of which the last was not made."""
    target = root / made.target
    is_there = target.exists()
    assert not is_there or f"rename /{made.target}" in calls[:-1]
    # The last sync is that of the directory in which it is.
    assert is_there or not (calls[-1] == "finished" or "fsync " in calls[:-1])
    steps = crashes.stock_lists(root)
    assert steps == ([1, 2] if made.how == "merge" and is_there else [1])
    assert not is_there or content_of(made.how, target) == made.wanted
    shutil.rmtree(target, ignore_errors=True)
    make(made.how, root, root)
    assert content_of(made.how, target) == made.wanted
    if made.how == "merge":  # An export itself removes what a killed one left.
        clean(root, dry_run=False, quiet_s=0)
    assert {path.name for path in root.iterdir()} == {"1", made.target}


def points_of(run, target, everywhere):
    """Calls, each with how many such there were: all of them, or those that count most."""
    renamed = run.index(f"rename /{target}")
    chosen = range(len(run)) if everywhere else [renamed // 2, renamed, renamed + 1, len(run) - 1]
    return [(run[i], run[: i + 1].count(run[i])) for i in sorted({*chosen})]


def test_killed_at_every_call(zygote, first_step, tmp_path, tell, made, everywhere):
    root, failures = tmp_path / "run", []

    def kill(call="", nth=1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first_step, root)
        calls = zygote.die(root, 2, {"call": call, "nth": nth}, made=made.how)
        try:
            check(root, made, calls)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"killed before {nth}. {call or 'nothing'}: {error!r}")
        return calls

    points = points_of(kill()[:-1], made.target, everywhere)
    for point in points:
        kill(*point)
    assert not failures, "\n".join(failures)
    tell("What is made of steps, killed at every call", made.how, f"{len(points)} kills")


def test_the_power_is_cut_at_every_call(zygote, first_step, disk, tell, made, everywhere):
    failures, copy = [], disk.mounted.with_name("copy")

    def cut(call="", nth=1):
        root = disk.replace(first_step)
        death = {"call": call, "nth": nth, "cut": str(disk.mounted), "late": True}
        calls = zygote.die(root, 2, death, made=made.how)
        disk.after_the_cut(root, copy)
        try:
            check(copy, made, calls)
        except Exception as error:  # noqa: BLE001 - All are told at the end.
            failures.append(f"cut before {nth}. {call or 'nothing'}: {error!r}")
        return calls

    points = points_of(cut()[:-1], made.target, everywhere)
    for point in points:
        cut(*point)
    assert not failures, "\n".join(failures)
    tell("Power cuts", made.how, f"{len(points)} calls", "all is whole that is there")
