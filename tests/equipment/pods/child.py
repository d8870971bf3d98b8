"""One process of a job, started by `jobs.py`: runs one scenario and prints one line of JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from equipment.gates import Gate, failing_at, held_at
from equipment.pods import states, v1, worker
from equipment.pods.jobs import HEARTBEAT_TIMEOUT_S
from equipment.pods.kill_points import killing

import lazy_orbax
from lazy_orbax import _machine
from lazy_orbax.combine import merge_work
from lazy_orbax.errors import KeeperError
from lazy_orbax.handlers import promoting
from lazy_orbax.save import commit, writer
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.storage import pace as pacing
from lazy_orbax.tiers.kept_steps import kept_steps
from lazy_orbax.tiers.promoted_steps import listed

Report = dict[str, Any]


def _mesh(shape: tuple[int, ...] | None = None) -> jax.sharding.Mesh:
    """All devices, each axis over several processes where it can be."""
    shape = shape or (jax.process_count(), jax.local_device_count())
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))


def _manager(root: str, **options: Any) -> ocp.CheckpointManager:
    lazy = lazy_orbax.LazyOptions(slab_bytes=2**20, **options.pop("lazy", {}))
    return ocp.CheckpointManager(
        root,
        item_handlers=lazy_orbax.standard_handler(options=lazy),
        options=ocp.CheckpointManagerOptions(**options),
    )


def _save(manager: ocp.CheckpointManager, step: int, state: Any) -> bool:
    return manager.save(step, args=ocp.args.StandardSave(state))


def _pointers(state: dict[str, jax.Array]) -> list[int]:
    return sorted(
        shard.data.unsafe_buffer_pointer()
        for leaf in state.values()
        for shard in leaf.addressable_shards
    )


def twenty_saves(root: str) -> Report:
    """Saves after each of twenty steps that donate the state."""
    n_bytes = [0]
    write_pieces = writer.Writer.write

    def counted(writer: Any, pieces: Any) -> Any:
        pieces = list(pieces)
        n_bytes[-1] += sum(view.nbytes for _, view in pieces)
        return write_pieces(writer, pieces)

    writer.Writer.write = counted  # type: ignore[method-assign]
    state = states.on_mesh(_mesh(), 0)
    step = states.training_step(state)
    moved = []
    with _manager(root) as manager:
        for n in range(1, 21):
            before = _pointers(state)
            state = step(state)
            moved += [n] * (_pointers(state) != before)
            _save(manager, n, state)
            # What is being saved is donated, and the buffers are written to, at once.
            state = step(state)
            state = step(state)
            manager.wait_until_finished()
            n_bytes.append(0)
        return {
            "steps": manager.all_steps(),
            "bytes": n_bytes[:-1],
            "moved": moved,
            "in_flight": HOST_BUDGET.in_flight_bytes,
        }


def corrupted(root: str) -> Report:
    """Breaks what only process 1 reads of step 3: all must agree, and none may hang."""
    mesh = _mesh()
    report: Report = {}
    with _manager(root) as manager:
        state = states.on_mesh(mesh, 0)
        step = states.training_step(state)
        for n in (1, 2, 3):
            state = step(state)
            _save(manager, n, state)
            manager.wait_until_finished()
        before = manager.directory / "3" / "default" / "ocdbt.process_1" / "d"
        ocp.multihost.sync_global_processes("saved")
        report["whole"] = lazy_orbax.verify(root).is_whole
        ocp.multihost.sync_global_processes("verified")
        if jax.process_index() == 0:
            file = max(before.iterdir(), key=lambda path: path.stat().length)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 4
            file.write_bytes(bytes(content))
        ocp.multihost.sync_global_processes("broken")
        args = ocp.args.StandardRestore(states.targets(mesh, states.SPECS))
        report["plain"] = _outcome(lambda: manager.restore(3, args=args))
        found = lazy_orbax.restore_latest_good(manager, args=args)
        report["step"] = found.step
        report["differences"] = states.differences(found.value, states.values(2))
        report["skipped"] = [skipped.why for skipped in found.skipped]
        problems = [str(problem) for problem in lazy_orbax.verify(root).all_problems]
        report["problems"] = problems
        leaf = problems[0].split()[1].partition("[")[0]
        replaced = lazy_orbax.restore_replacing(
            manager, 3, args=args, replacements={leaf: lazy_orbax.FromStep(2)}
        )
        report["replaced"] = [(record.leaf, record.by) for record in replaced.replaced]
        report["leaf"] = leaf
        report["left"] = states.differences(replaced.value, states.values(3))
        ocp.multihost.sync_global_processes("replaced")
        if jax.process_index() == 0:
            (before.parent.parent / "lazy_orbax_digests" / "process_1").unlink()
        ocp.multihost.sync_global_processes("digests removed")
        report["without"] = [str(p) for p in lazy_orbax.verify(root).all_problems]
    return report


def flipped(root: str) -> Report:
    """Flips a bit of what process 2 wrote, restores onto two meshes, and flips it back."""
    mesh, report = _mesh(), {}

    def flip(file: Any) -> None:
        ocp.multihost.sync_global_processes("before a flip")
        if jax.process_index() == 0:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 4
            file.write_bytes(bytes(content))
        ocp.multihost.sync_global_processes("after a flip")

    with _manager(root) as manager:
        _save(manager, 1, states.on_mesh(mesh, 0))
        manager.wait_until_finished()
        place = manager.directory / "1" / "default" / "ocdbt.process_2" / "d"
        file = max(place.iterdir(), key=lambda path: path.stat().length)
        wanted = {
            name: ocp.args.StandardRestore(states.targets(mesh, specs))
            for name, specs in (("same", states.SPECS), ("other", states.OTHER_SPECS))
        }
        flip(file)
        report["failed"] = {
            name: _outcome(lambda args=args: manager.restore(1, args=args))
            for name, args in wanted.items()
        }
        flip(file)
        report["wrong"] = [
            difference
            for args in wanted.values()
            for difference in states.differences(manager.restore(1, args=args), states.values(0))
        ]
    return report


def killed(root: str, point: str, watched: int, victim: int, pids: str) -> Report:
    """Saves step 1, then kills `victim` when `watched` comes to `point` of the save of step 2."""
    me = jax.process_index()
    (pathlib.Path(pids) / str(me)).write_text(str(os.getpid()))
    state = states.on_mesh(_mesh(), 0)
    step = states.training_step(state)
    with _manager(root) as manager:
        _save(manager, 1, state)
        state = step(state)
        manager.wait_until_finished()
        victim_pid = int((pathlib.Path(pids) / str(victim)).read_text())
        with killing(point, victim_pid) if me == watched else contextlib.nullcontext():
            _save(manager, 2, state)
            manager.wait_until_finished()
            # Nobody passes here: a process that the kill did not reach waits for it to arrive.
            jax.block_until_ready(step(state))
            ocp.multihost.sync_global_processes("the end")
    return {"steps": manager.all_steps()}


def _outcome(call: Any) -> Report:
    start_s = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - It is reported.
        facts = {name: getattr(error, name, None) for name in ("process", "leaf", "step")}
        message = str(error)
        kind = type(error).__name__
        return {"s": time.monotonic() - start_s, "message": message, "kind": kind, **facts}
    return {"s": time.monotonic() - start_s}


def failing(root: str) -> Report:
    """Fails at each place, on each process in turn, and saves the same step again."""
    state = states.on_mesh(_mesh(), 0)
    lines: list[lazy_orbax.SaveTimeline] = []
    report: Report = {"failed": {}, "again": {}}
    places = ["copy", "to the host", "hand over", "storage", "finish", "sync", "merge"]
    with _manager(root, lazy={"on_timeline": lines.append}) as manager:
        step = 0
        for place in places:
            for culprit in [0] if place == "merge" else range(jax.process_count()):
                step += 1
                with _failing(place, jax.process_index() == culprit):
                    _save(manager, step, state)
                    case = f"{place} on {culprit}"
                    report["failed"][case] = _outcome(manager.wait_until_finished)
                _save(manager, step, state)
                report["again"][case] = _outcome(manager.wait_until_finished)
        # What is left of a step that is not saved again.
        with _failing("finish", jax.process_index() == jax.process_count() - 1):
            _save(manager, step + 1, state)
            _outcome(manager.wait_until_finished)
        mine = f"*tmp*/*/ocdbt.process_{jax.process_index()}"
        report["own_left"] = [str(path) for path in pathlib.Path(root).glob(mine)]
        _save(manager, step + 2, state)
        manager.wait_until_finished()
        report["left"] = [path.name for path in pathlib.Path(root).glob("*tmp*")]
        report["steps"] = manager.all_steps()
    report["timelines"] = [line.error is None for line in lines]
    report["in_flight"] = HOST_BUDGET.in_flight_bytes
    return report


@contextlib.contextmanager
def _failing(place: str, here: bool) -> Any:
    error = OSError(f"no luck at {place}")
    if not here:
        yield
    elif place == "merge":

        def fail(directory: Any) -> None:
            raise error

        original = commit.Commit.__init__

        def init(self: Any, *args: Any, merge: Any, **kwargs: Any) -> None:
            original(self, *args, merge=fail, **kwargs)

        commit.Commit.__init__ = init  # type: ignore[method-assign]
        try:
            yield
        finally:
            commit.Commit.__init__ = original  # type: ignore[method-assign]
    elif place == "storage":
        original_init = writer.Writer.__init__

        def obstructed(self: Any, plan: Any, format_: Any, directory: str, **knobs: Any) -> None:
            # A file where TensorStore wants a directory.
            (pathlib.Path(directory) / f"ocdbt.process_{jax.process_index()}").touch()
            original_init(self, plan, format_, directory, **knobs)

        writer.Writer.__init__ = obstructed  # type: ignore[method-assign]
        try:
            yield
        finally:
            writer.Writer.__init__ = original_init  # type: ignore[method-assign]
    else:
        with failing_at(place, error=error):
            yield


def one_save(root: str, how: str) -> Report:
    """Saves one step, with stock Orbax or with a form of lazy_orbax."""
    handler = {
        "stock": ocp.StandardCheckpointHandler,
        "ocdbt": lazy_orbax.standard_handler,
        "zarr": lambda: lazy_orbax.standard_handler(use_ocdbt=False),
    }[how]()
    with ocp.CheckpointManager(root, item_handlers=handler) as manager:
        _save(manager, 1, states.on_mesh(_mesh(), 1))
        manager.wait_until_finished()
        return {"steps": manager.all_steps()}


def linked_saves(root: str, *, in_database: bool) -> Report:
    """Saves two steps, of which the second links what did not change."""
    told: list[lazy_orbax.SaveTimeline] = []
    options = lazy_orbax.LazyOptions(skip_unchanged=True, on_timeline=told.append)
    handler = lazy_orbax.standard_handler(options=options, use_ocdbt=in_database)
    changed, kept = states.on_mesh(_mesh(), 2), states.on_mesh(_mesh(), 1)
    with ocp.CheckpointManager(root, item_handlers=handler) as manager:
        for step, others in ((1, kept), (2, {"both": changed["both"], "prime": changed["prime"]})):
            _save(manager, step, {**kept, **others})
            manager.wait_until_finished()
        steps = manager.all_steps()
    return {"steps": steps, "linked": [one.bytes_linked for one in told]}


def two_items(root: str) -> Report:
    """One handler saves two items; one of them fails on the last process."""
    state = states.on_mesh(_mesh(), 0)
    handler = lazy_orbax.standard_handler()
    last = jax.process_index() == jax.process_count() - 1
    with ocp.CheckpointManager(root, item_handlers={"a": handler, "b": handler}) as manager:

        def save_both() -> Report:
            items = {name: ocp.args.StandardSave(state) for name in ("a", "b")}
            manager.save(1, args=ocp.args.Composite(**items))
            return _outcome(manager.wait_until_finished)

        with failing_at("finish", call=2) if last else contextlib.nullcontext():
            failed = save_both()
        return {"failed": failed, "again": save_both(), "steps": manager.all_steps()}


def hanging(root: str) -> Report:
    """The last process hangs while it writes, longer than Orbax' timeout."""
    state = states.on_mesh(_mesh(), 0)
    options = ocp.AsyncOptions(timeout_secs=3)
    here = jax.process_index() == jax.process_count() - 1
    with _manager(root, async_options=options) as manager:
        with held_at("hand over") if here else contextlib.nullcontext(Gate()) as gate:
            _save(manager, 1, state)
            outcome = _outcome(manager.wait_until_finished)
            gate.opened.set()
        _save(manager, 2, state)
        again = _outcome(manager.wait_until_finished)
        return {"failed": outcome, "again": again, "steps": manager.all_steps()}


def busy(root: str) -> Report:
    """Saves are skipped while one is in progress; only the last process is slow."""
    state = states.on_mesh(_mesh(), 0)
    policy = ocp.checkpoint_managers.ContinuousCheckpointingPolicy()
    here = jax.process_index() == jax.process_count() - 1
    with _manager(root, save_decision_policy=policy) as manager:
        with held_at("hand over") if here else contextlib.nullcontext(Gate()) as gate:
            saved = [_save(manager, 1, state)]
            if here:
                gate.await_call()
            ocp.multihost.sync_global_processes("the last process is held")
            saved += [_save(manager, 2, state), _save(manager, 3, state)]
            gate.opened.set()
            manager.wait_until_finished()
        saved.append(_save(manager, 4, state))
        manager.wait_until_finished()
        return {"saved": saved, "steps": manager.all_steps()}


def restored(root: str, step: int, n_steps: int, shape: list[int], again: str) -> Report:
    """Restores with stock Orbax on a mesh of this shape, by both sets of specs, and saves again."""
    wanted = states.values(n_steps)
    wrong: list[str] = []
    stock = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(root, item_handlers=stock) as manager:
        for specs in (states.SPECS, states.OTHER_SPECS):
            target = states.targets(_mesh(tuple(shape)), specs)
            found = manager.restore(step, args=ocp.args.StandardRestore(target))
            wrong += states.differences(found, wanted)
    with _manager(again) as manager:
        _save(manager, step, found)
    return {"wrong": wrong}


def node_local(root: str) -> Report:
    """Each process saves to a directory of its own, and restores from it with stock Orbax."""
    mine = f"{root}/disk_of_{jax.process_index()}"
    state = states.on_mesh(_mesh(), 0)
    step = states.training_step(state)
    local = lazy_orbax.node_local_options(ocp.CheckpointManagerOptions(save_interval_steps=1))
    handler = lazy_orbax.standard_handler(**local.handler)
    with ocp.CheckpointManager(mine, options=local.manager, item_handlers=handler) as manager:
        for n in range(1, 4):
            state = step(state)
            _save(manager, n, state)
        manager.wait_until_finished()
        with _failing("finish", jax.process_index() == 1):
            _save(manager, 4, state)
            failed = _outcome(manager.wait_until_finished)
        steps = manager.all_steps()
    local = lazy_orbax.node_local_options()
    stock = ocp.PyTreeCheckpointHandler(**local.handler)
    with ocp.CheckpointManager(mine, options=local.manager, item_handlers=stock) as manager:
        target = states.targets(_mesh(), states.SPECS)
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        wrong = states.differences(manager.restore(3, args=arguments), states.values(3))
    return {"steps": steps, "failed": failed, "wrong": wrong}


def preempted(root: str, signalled: list[int], saves: bool) -> Report:
    """Some processes get SIGTERM while a slow save is in flight; all save once more and leave."""
    initialize = pacing.Pace.__init__
    # A minute for each process, and more than an option may ask for.
    pacing.Pace.__init__ = lambda self, bytes_per_s: initialize(self, bytes_per_s // 64)
    state = states.on_mesh(_mesh(), 0)
    step = states.training_step(state)
    lazy = {"write_bytes_per_s": 2**20}
    with (
        lazy_orbax.Preemption(grace_s=60) as preemption,
        _manager(root, lazy=lazy, save_interval_steps=10**9) as manager,
    ):
        for n in itertools.count(1):
            state = step(state)
            # In place of the step's own collectives.
            ocp.multihost.sync_global_processes(f"step {n}")
            if saves or n == 1:
                _save(manager, n, state)
            if n == 2:
                slow = manager.is_saving_in_progress() and not _machine._Urgency.hurry
                if jax.process_index() in signalled:
                    os.kill(os.getpid(), signal.SIGTERM)
            if preemption.reached(manager, n):
                break
        hurried = _machine._Urgency.hurry
        last = preemption.last_save(manager, n, args=ocp.args.StandardSave(state))
        facts = {**dataclasses.asdict(last), "error": repr(last.error)}
        return {"last": facts, "reached": n, "slow": slow, "hurried": hurried}


def at_intervals(root: str) -> Report:
    """Asks at each of forty steps a policy whose clock, and so all it measures, is this process's.

    By its own clock each process would save at other steps. Some saves take several to be written.
    """
    process, clock = jax.process_index(), [0.0]
    policy = lazy_orbax.SaveIntervalPolicy(most_overhead=0.2, clock=lambda: clock[0])
    saved, state = [], states.on_mesh(_mesh(), 0)
    with _manager(root, save_decision_policy=policy) as manager:
        for n in range(1, 41):
            if _save(manager, n, state):
                saved.append(n)
                clock[0] += 3.0 + 2.0 * process
            clock[0] += 1.0 + 0.1 * process
            if n % 2:
                manager.wait_until_finished()
        manager.wait_until_finished()
        return {"saved": saved, "steps": manager.all_steps(), "report": str(policy.report())}


def merged(root: str, use_ocdbt: bool) -> Report:
    """Merges two steps, each process a share; once in vain, for the last one fails."""
    handler = lazy_orbax.standard_handler(use_ocdbt=use_ocdbt)
    with ocp.CheckpointManager(root, item_handlers=handler) as manager:
        for n in (1, 2):
            _save(manager, n, states.on_mesh(_mesh(), n))
        manager.wait_until_finished()
    merge = functools.partial(
        lazy_orbax.merge, [f"{root}/{n}" for n in (1, 2)], [0.25, 0.75], others=0, host_bytes=2**20
    )
    combine = merge_work.combine
    if jax.process_index() == jax.process_count() - 1:
        merge_work.combine = None  # type: ignore[assignment]
    failed = _outcome(lambda: merge(f"{root}/3"))
    merge_work.combine = combine
    return {"failed": failed, "bytes": merge(f"{root}/3").bytes_written}


def modes(root: str) -> Report:
    """The three modes of a snapshot, and trees that are refused."""
    return worker.main(pathlib.Path(root))


def saved_by_v1(root: str) -> Report:
    """Saves with the functions of Orbax v1, and with its `Checkpointer`."""
    return v1.main(pathlib.Path(root), _mesh())


def killed_in_v1(root: str, way: str, **kill: Any) -> None:
    """Saves step 1 with Orbax v1, and dies in the save of step 2."""
    v1.killed(pathlib.Path(root), _mesh(), way, v1.Kill(**kill))


def preempted_in_v1(root: str, signalled: int) -> Report:
    """One process gets SIGTERM while a `Checkpointer` of Orbax v1 is used."""
    return v1.preempted(pathlib.Path(root), _mesh(), signalled)


def promoted(root: str, memory: str) -> Report:
    """The keeper that both share brings step 5 down when all have it, and not before."""
    mesh, process = _mesh(), jax.process_index()
    tier = lazy_orbax.Tier(f"{root}/tier", every_s=0.1)
    run = f"{root}/run"
    with (
        lazy_orbax.Keeper(run, directory=memory, tiers=[tier]) as keeper,
        _manager(run) as manager,
    ):
        states_at = {step: states.on_mesh(mesh, step) for step in (5, 6)}
        if process == 0:
            keeper.save(5, states_at[5])
            keeper.wait()
            try:
                promoting.promote(run, tier, memory)
                why = "it was promoted"
            except KeeperError as error:
                why = str(error)
        else:
            why = ""
        ocp.multihost.sync_global_processes("one has it")
        before = os.listdir(tier.path) if os.path.isdir(tier.path) else []
        ocp.multihost.sync_global_processes("looked")
        if process == 1:
            keeper.save(5, states_at[5])
            keeper.wait()
        while not [step for step, _ in listed(tier.path)]:
            time.sleep(0.05)
        ocp.multihost.sync_global_processes("it is there")
        found = _restored_without_memory(manager, keeper, mesh)
        wrong = states.differences(found.value, states.values(5))
    return {"why": why, "before": before, "found": [found.step, found.tier], "wrong": wrong}


def keepers_apart(root: str, memory: str) -> Report:
    """Processes with a keeper each, as on machines of their own, bring a step to one tier."""
    mesh, process, run = _mesh(), jax.process_index(), f"{root}/run"
    memory = f"{memory}{process}"
    other = lazy_orbax.Tier(f"{root}/tier{process}", every_s=1)
    why = _outcome(lambda: lazy_orbax.Keeper(run, directory=memory, tiers=[other]))
    tier = lazy_orbax.Tier(f"{root}/tier", every_s=1)
    with (
        lazy_orbax.Keeper(run, directory=memory, tiers=[tier]) as keeper,
        _manager(run) as manager,
    ):
        for step in (5, 6):
            keeper.save(step, states.on_mesh(mesh, step))
            keeper.wait()
        ocp.multihost.sync_global_processes("all have it")
        while 6 not in dict(listed(tier.path)):
            time.sleep(0.05)
        found = _restored_without_memory(manager, keeper, mesh)
        wrong = states.differences(found.value, states.values(6))
    return {"why": why, "found": [found.step, found.tier], "wrong": wrong}


def _restored_without_memory(
    manager: ocp.CheckpointManager, keeper: lazy_orbax.Keeper, mesh: jax.sharding.Mesh
) -> lazy_orbax.reports.Newest:
    for file in keeper.slots.files(["default"]):
        keeper.slots.shelf.remove(file)
    ocp.multihost.sync_global_processes("memory is gone")
    args = ocp.args.StandardRestore(states.targets(mesh, states.OTHER_SPECS))
    return lazy_orbax.restore_newest(manager, keeper, args=args)


def stepped_back(root: str, memory: str) -> Report:
    """Step 5 is taken a second time, with other values, by one process before the other."""
    mesh, process, run = _mesh(), jax.process_index(), f"{root}/run"
    with lazy_orbax.Keeper(run, directory=memory) as keeper:
        found = []
        for values, turns in ((6, [(0, 1)]), (5, [(0,), (1,)])):
            state = states.on_mesh(mesh, values)
            for turn in turns:
                if process in turn:
                    keeper.save(5, state)
                    keeper.wait()
                ocp.multihost.sync_global_processes(f"saved {values} {turn}")
                found.append(_whole_in(keeper))
                ocp.multihost.sync_global_processes(f"looked {values} {turn}")
    return {"found": found}


def _whole_in(keeper: lazy_orbax.Keeper) -> list[list[int]]:
    """Returns which values each step in memory has that is whole; none: it is of no state."""
    found = []
    for kept in kept_steps(keeper.slots.shelf, keeper.run):
        with contextlib.suppress(KeeperError):
            kept.refuse_parts()
            values = _bytes_of(kept.values()["default"])
            found.append([n for n in (5, 6) if values == _bytes_of(states.values(n))])
    return found


def _bytes_of(tree: dict[str, Any]) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


SCENARIOS = {
    function.__name__: function
    for function in (
        twenty_saves,
        corrupted,
        flipped,
        killed,
        failing,
        linked_saves,
        one_save,
        two_items,
        hanging,
        busy,
        restored,
        node_local,
        preempted,
        at_intervals,
        merged,
        promoted,
        keepers_apart,
        stepped_back,
        modes,
        saved_by_v1,
        killed_in_v1,
        preempted_in_v1,
    )
}


def main(
    membership: tuple[str, int, int],
    scenario: str,
    told: dict[str, Any],
    log: str,
    environment: dict[str, str],
) -> None:
    """Runs in a process that was just forked, before anything of JAX was used."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # JAX read some of them when it was imported.
    jax.config.update("jax_platforms", environment["JAX_PLATFORMS"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        *membership,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        initialization_timeout=60,
        shutdown_timeout_seconds=30,
    )
    report = SCENARIOS[scenario](**told)
    os.write(1, f"\nREPORT {json.dumps(report)}\n".encode())
    jax.distributed.shutdown()
