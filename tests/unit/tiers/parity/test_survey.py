"""What is lost, and how it is made, follows from what each machine says that it has."""

import json

import pytest

from lazy_orbax.tiers.parity.survey import Lost, plans


def snapshot(process, step, *, life=1, item="default", processes=3):
    about = {"item": item, "step": step, "life": life, "process": process}
    return {**about, "processes": processes, "serial": step, "n_bytes": 1000 + process}


def parity(process, step, members=(0, 1, 2), **more):
    noted = [
        {"process": one, "n_bytes": 1000 + one, "serial": step,
         "digest": None if one == process else 100 * one + process}
        for one in members
    ]  # fmt: skip
    return {**snapshot(process, step, **more), "members": noted, "parity_digest": 9000 + process}


def machine(name, *has):
    return {
        "address": name,
        "snapshots": [one for one in has if "members" not in one],
        "parities": [one for one in has if "members" in one],
    }


def full(process, *steps, life=1):
    held = [make(process, step, life=life) for step in steps for make in (snapshot, parity)]
    return machine(f"m{process}", *held)


def test_what_is_everywhere_needs_nothing_and_the_newest_is_first():
    found, missing = plans([full(i, 10, 20) for i in range(3)], ["default"], None)
    assert [(plan.step, plan.lost) for plan in found] == [(20, ()), (10, ())]
    assert missing == {}


def test_a_lost_one_is_made_from_all_others():
    found, _ = plans([full(0, 10), machine("new"), full(2, 10)], ["default"], None)
    ((lost,),) = [plan.lost for plan in found]
    assert (lost.process, lost.n_bytes, lost.serial, lost.copy) == (1, 1001, 10, None)
    assert [(one.process, one.snapshot, one.parity) for one in lost.sources] == [
        (0, "m0", "m0"), (1, None, None), (2, "m2", "m2"),
    ]  # fmt: skip
    assert lost.sources[2].digests == (2, 102, None)
    assert Lost.told(json.loads(json.dumps(lost.as_message()))) == lost


def test_a_process_that_moved_gets_a_copy():
    found, _ = plans([full(1, 10), full(0, 10), full(2, 10)], ["default"], None)
    assert [(one.process, one.copy) for one in found[0].lost] == [(0, "m0"), (1, "m1")]


def test_who_survived_may_be_on_any_machine():
    """Hosts 1 and 2 of three: their processes are 0 and 1 now, and 2 is on a new host."""
    found, _ = plans([full(1, 10), full(2, 10), machine("new")], ["default"], None)
    ways = [(one.process, one.copy, len(one.sources)) for one in found[0].lost]
    assert ways == [(0, None, 3), (1, "m1", 0), (2, "m2", 0)]


@pytest.mark.parametrize("gone", ["snapshot", "parity"])
def test_what_a_group_misses_is_named(gone):
    second = full(2, 10)
    second["snapshots" if gone == "snapshot" else "parities"] = []
    found, missing = plans([full(0, 10), machine("new"), second], ["default"], None)
    assert found == []
    assert f"the {gone} of process 2" in missing[10]


def test_parity_of_another_group_is_not_put_together_with_that_of_one():
    """The job restarted in other groups, and ended before all had parity in these."""
    first, second = machine("m1", snapshot(1, 10), parity(1, 10)), snapshot(2, 10)
    other = machine("m2", second, parity(2, 10, (0, 2)))
    missing = plans([machine("new"), first, machine("m2", second)], ["default"], None)[1]
    assert "the parity of process 2" in missing[10]
    (plan,), _ = plans([machine("new"), first, other], ["default"], None)
    assert [one.process for one in plan.lost[0].sources] == [0, 2]
    moved = machine("m3", parity(2, 10))
    (plan,), _ = plans([machine("new"), first, other, moved], ["default"], None)
    by_process = {one.process: one for one in plan.lost[0].sources}
    assert (by_process[1].parity, by_process[2].parity) == ("m1", "m3")


def test_of_two_parities_on_one_machine_it_is_the_one_that_it_sends():
    """It looks for them in the order of its listing."""
    twice = machine("m1", snapshot(1, 10, processes=2), parity(1, 10, (0, 1)))
    twice["parities"].append({**twice["parities"][0], "parity_digest": 5})
    (plan,), _ = plans([machine("new"), twice], ["default"], None)
    assert plan.lost[0].sources[1].parity_digest == 9001


def test_the_newest_that_can_be_made_whole_is_first():
    newer = snapshot(0, 20), snapshot(2, 20), parity(0, 20)  # Process 2 had not made parity yet.
    first, third = full(0, 10), full(2, 10)
    first["snapshots"].append(newer[0])
    third["snapshots"].append(newer[1])
    first["parities"].append(newer[2])
    found, missing = plans([first, machine("new"), third], ["default"], None)
    assert [plan.step for plan in found] == [10]
    assert "the parity of process 2" in missing[20]


def test_every_item_is_wanted():
    listings = [full(i, 10) for i in range(3)]
    found, missing = plans(listings, ["default", "other"], None)
    assert found == []
    assert "nobody has parity" in missing[10]


def test_an_older_life_that_comes_back_is_behind_the_later_one():
    """The job went on from storage, on machines that had nothing; then the old ones came back."""
    listings = [full(i, 20, 30, life=5) for i in range(3)]
    for listing, late in zip(listings, [full(i, 900, 910, life=4) for i in range(3)], strict=True):
        for kind in ("snapshots", "parities"):
            listing[kind] = late[kind] + listing[kind]
    found, _ = plans(listings, ["default"], None)
    assert [(plan.step, plan.life) for plan in found] == [(30, 5), (20, 5), (910, 4), (900, 4)]


def test_lives_of_a_job_are_not_put_together():
    listings = [full(0, 10), machine("m1", snapshot(1, 10, life=2)), full(2, 10)]
    found, missing = plans(listings, ["default"], None)
    assert [(plan.life, [one.process for one in plan.lost]) for plan in found] == [(1, [1])]
    assert 10 in missing


def test_what_storage_has_newer_is_not_made():
    assert plans([full(i, 10) for i in range(3)], ["default"], 11) == ([], {})


@pytest.mark.parametrize(
    ("n_then", "n", "parts"),
    [
        (3, 3, [[0], [1], [2]]),
        (3, 2, [[0, 1], [1, 2]]),
        (2, 3, [[0], [0, 1], [1]]),
        (4, 2, [[0, 1], [2, 3]]),
        (2, 4, [[0], [0], [1], [1]]),
        (5, 1, [[0, 1, 2, 3, 4]]),
    ],
)
def test_a_job_of_another_size_gets_what_lies_along_the_row_of_its_processes(n_then, n, parts):
    listings = [machine(f"m{i}", snapshot(i, 10, processes=n_then)) for i in range(n_then)]
    now = [*listings, *(machine(f"new{i}") for i in range(n))][:n]
    # Those that are no members any more are not asked: the first ones have what they had.
    for i, gone in enumerate(listings[n:]):
        now[i % n] = machine(now[i % n]["address"], *now[i % n]["snapshots"], *gone["snapshots"])
    ((plan,), missing) = plans(now, ["default"], None)
    has = [[one["process"] for one in listing["snapshots"]] for listing in now]
    made = [(one.at, one.process) for one in plan.lost]
    assert missing == {}
    assert made == [(at, one) for at in range(n) for one in parts[at] if one not in has[at]]


def test_a_job_of_fewer_processes_makes_what_was_lost():
    """Host 2 of three is gone, and nobody took its place."""
    ((plan,), _) = plans([full(0, 10), full(1, 10)], ["default"], None)
    ways = [(one.at, one.process, one.copy, len(one.sources)) for one in plan.lost]
    assert ways == [(0, 1, "m1", 0), (1, 2, None, 3)]


def test_processes_that_differ_in_how_many_they_were_are_passed_over():
    listings = [machine("m0", snapshot(0, 10)), machine("m1", snapshot(1, 10, processes=2))]
    found, missing = plans(listings, ["default"], None)
    assert found == []
    assert "do not agree" in missing[10]
