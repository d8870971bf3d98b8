"""Whatever becomes of its machines: a job goes on from one life, the latest that has a whole step.

The game trains, and two trainings of a step come to different values. What it knows of the files is
little: which steps had parity everywhere, and that any one machine of a group may go then.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
from equipment import lives
from equipment.lives import ITEM, RUN, Process, World

from lazy_orbax.tiers.parity import files, restoring
from lazy_orbax.tiers.shelf import Shelf


@dataclasses.dataclass
class Promise:
    """What is to be found again: at least that step of that life, after few enough losses."""

    order: tuple[int, int]  # life, step
    machines: list
    groups: list
    spare: int  # of each group

    def holds(self, machines):
        lost = {i for i, one in enumerate(self.machines) if one not in machines}
        return all(len(lost & set(group)) <= self.spare for group in self.groups)


class Game:
    def __init__(self, monkeypatch, seed):
        self.monkeypatch, self.world = monkeypatch, World(monkeypatch, seed)
        self.random = self.world.random
        # By life and step: the state, and of how many processes.
        self.history = {}
        self.machines, self.away, self.promise = [], [], None
        self.outcomes = {"newest": 0, "older": 0, "nothing": 0}

    def likely(self, chance):
        return self.random.random() < chance

    def choose_machines(self):
        """Some are lost for good, some go away with their memory, and some come back."""
        n = self.random.choice((1, 2, 3, 3, 3, 4, 4))
        stay = []
        for machine in self.machines:
            if self.likely(0.75):
                stay.append(machine)
            elif self.likely(0.6):
                self.away.append(machine)
        if self.likely(0.3):
            self.random.shuffle(stay)
        self.away += stay[n:]
        stay = stay[:n]
        while len(stay) < n:
            if self.away and self.likely(0.5):
                stay.append(self.away.pop(self.random.randrange(len(self.away))))
            else:
                stay.append(self.world.machine())
        del self.away[:-6]
        for machine in stay:
            machine.clock_ns += self.random.choice((-(10**10), -2, 0, 1, 10**9, 10**10))
        self.machines = stay

    def job(self):
        """One job, from its start to its end."""
        self.choose_machines()
        n = self.world.n = len(self.machines)
        self.world.store = lives._Store()
        found_before = self.whole()
        group = self.random.choice((2, n)) if n > 1 else 2
        self.processes = [
            Process(self.world, machine, i, group) for i, machine in enumerate(self.machines)
        ]
        lives.begin_lives(self.monkeypatch, self.processes, [None] * n)
        for process in self.processes:
            with process.here():
                process.guard.join()
        self.go_on(found_before)
        try:
            self.train()
        finally:
            for process in self.processes:
                if process.guard.store is not None:
                    process.guard.link().close()
                process.slots.guard = None
                process.slots.close()

    def whole(self):
        """Returns the steps of which somebody has each snapshot."""
        held = {}
        for machine in self.machines:
            for one in files.listing_of(Shelf(machine.directory), RUN)["snapshots"]:
                held.setdefault((one["life"], one["step"]), set()).add(one["process"])
        return [key for key, who in held.items() if who >= set(range(self.history[key][1]))]

    def go_on(self, whole):
        found, own = lives.restored(self.processes)
        order = found and (found[1], found[0])
        if self.promise is not None and self.promise.holds(self.machines):
            whole = [*whole, self.promise.order]
        assert not whole or (order or (0, 0)) >= max(whole), (order, whole, self.promise)
        kind = "newest" if found and order == max(self.history) else "older"
        self.outcomes[kind if found else "nothing"] += 1
        if found is None:  # It begins with storage.
            self.step, self.value = 0, self.random.getrandbits(32)
            lives.begin_lives(self.monkeypatch, self.processes, own)
            return
        self.step, (self.value, _) = found[0], self.history[order]
        for process in self.processes:
            for who, value in lives.values_of(process, *found).items():
                assert np.array_equal(value, lives.content_of(self.value, who)), (found, who)
        n = len(self.processes)
        self.promise = Promise(order, list(self.machines), [tuple(range(n))], 0)
        lives.begin_lives(self.monkeypatch, self.processes, own)
        for process in self.processes:
            with process.here():
                restoring.protect_again(process.guard, [ITEM], *found)
                if process.waiting and process.guard.report.group:
                    key = files.Key(ITEM, *found)
                    process.guard.link().serving.announced.tell(key, is_there=True)
        if not self.settled(0.02):
            raise Over
        self.note(order)

    def note(self, order):
        """Notes what is promised when nothing is on its way."""
        guards = [process.guard for process in self.processes]
        if any(guard.is_in_vain for guard in guards):
            self.promise = None
        elif {(one.report.newest_step, one.report.error) for one in guards} == {(order[1], None)}:
            groups = {guard.report.group for guard in guards}
            self.promise = Promise(order, list(self.machines), sorted(groups), 1)

    def settled(self, chance):
        """Does all that waits, in any order. Returns `False` where the job ends before."""
        while waiting := [process for process in self.processes if process.waiting]:
            if self.likely(chance):
                return False
            self.random.choice(waiting).settle()
        return True

    def train(self):
        """Takes steps until it is killed."""
        done = [(self.step, self.value)]
        for _ in range(self.random.randrange(8)):
            if self.likely(0.15):  # It goes on from an older state, which was in storage.
                if not self.settled(0.02):
                    return
                self.step, self.value = self.random.choice(done)
            self.step, self.value = self.step + 1, self.random.getrandbits(32)
            done.append((self.step, self.value))
            if not self.save():
                return
            if self.likely(0.2):
                continue  # The next one comes while this one is on its way.
            if not self.settled(0.03):
                return
            life = self.processes[0].slots.life
            self.note((life, self.step))

    def save(self):
        order = list(self.processes)
        for process in self.random.sample(order, len(order)):
            if self.likely(0.02):
                return False
            process.begin(self.step)
        (life,) = {process.slots.life for process in order}
        self.history[life, self.step] = self.value, len(order)
        for process in self.random.sample(order, len(order)):
            if self.likely(0.04):
                return False
            content = lives.content_of(self.value, process.index)
            process.end(None if self.likely(0.04) else content)
        return True


class Over(Exception):
    pass


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 50))]
)
def test_a_job_goes_on_from_the_latest_life_that_has_a_whole_step(seed, monkeypatch, tell):
    game = Game(monkeypatch, seed)
    try:
        for _ in range(40):
            with contextlib.suppress(Over):
                game.job()
    finally:
        game.world.close()
    tell("restarts", str(game.outcomes))
