"""Trains on several processes with snapshots in memory, which outlive the processes that die.

    python examples/outlive.py                  # 4 processes; one is killed, then all of them
    python examples/outlive.py --processes 3
    python examples/outlive.py --machines       # each process plays a machine, which is lost whole

Each process keeps a snapshot of its part every few steps, in a keeper that survives `kill -9`.
First the job runs undisturbed. Then it runs again: one process is killed and the job ends, the
next one goes on; all processes are killed at once, the next job goes on. Storage has nothing but
the first step. Each time the losses continue bit for bit as in the run that was never killed.

With `--machines`, each process has a memory of its own, and keeps parity of that of the others.
One dies and takes its memory with it: its keeper and its snapshots. What it had is made again from
what the others have.
"""

import argparse
import collections
import glob
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from multihost_train import (
    BATCH,
    address_for_a_job,
    batch_of,
    init,
    rows_spec,
    spec_of,
    targets_of,
    train_step,
)

import lazy_orbax

TO_MEMORY, TO_STORAGE = 3, 1000  # every so many steps


def train(
    directory: str, memory: str, n_steps: int, kill: tuple[int, str], *, machines: bool
) -> None:
    """Trains from the newest step there is, and notes each loss.

    Args:
        directory: the run.
        memory: where the keeper has its snapshots.
        n_steps: so many steps in all.
        machines: whether each process plays a machine.
        kill: after which step who dies: `one`, `all` or `nobody`.
    """
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    abstract = jax.eval_shape(init)
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf)), abstract)
    step_fn = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    process, last = jax.process_index(), jax.process_count() - 1
    parity = None
    if machines:
        memory = memory_of(memory, process)
        parity = lazy_orbax.Parity(group=last + 1, domain=f"machine {process}")
    keeper = lazy_orbax.Keeper(directory, directory=memory, parity=parity)
    options = ocp.CheckpointManagerOptions(save_interval_steps=TO_STORAGE)
    handler = lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(keeper=keeper))
    with (
        open(f"{directory}/losses-{process}", "a") as losses,
        ocp.CheckpointManager(directory, item_handlers=handler, options=options) as manager,
    ):
        try:
            args = ocp.args.StandardRestore(targets_of(abstract, shardings))
            newest = lazy_orbax.restore_newest(manager, keeper, args=args)
            state, first = newest.value, newest.step + 1
            if process == 0:
                print(f"goes on from step {newest.step}, in {newest.tier}", flush=True)
                for one in newest.rebuilt:
                    who = ", ".join(map(str, one.sources))
                    print(f"what process {one.process} had was made again by {who}", flush=True)
        except FileNotFoundError:
            state, first = jax.jit(init, out_shardings=shardings)(), 0
        rows = NamedSharding(mesh, rows_spec(BATCH))
        for step in range(first, n_steps):
            state, loss = step_fn(state, batch_of(step, rows))
            losses.write(f"{step} {float(loss).hex()}\n")
            losses.flush()
            manager.save(step, args=ocp.args.StandardSave(state))
            if step % TO_MEMORY == 0:
                keeper.save(step, state)
                if machines:  # So that this demonstration knows which step will be there.
                    keeper.wait()
                    assert keeper.protection.newest_step == step, keeper.protection
            when, who = kill
            if step == when and (who == "all" or (who == "one" and process == last)):
                os.kill(os.getpid(), signal.SIGKILL)
    keeper.close()


def memory_of(memory: str, process: int) -> str:
    """Returns the memory of a process that plays a machine."""
    return f"{memory}-{process}"


# ---------------------------------------------------------------- on one machine


def run(n: int, arguments: list[str]) -> list[int]:
    """Runs a job of `n` processes on this machine. Returns how they ended."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, __file__, *arguments, "--join", address_for_a_job(), str(n)]
    processes = [subprocess.Popen([*command, str(i)], env=environment) for i in range(n)]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            if any(process.poll() for process in processes):
                # As a scheduler does: nobody goes on without the one that died.
                for process in processes:
                    process.kill()
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def losses_of(directory: str) -> dict[int, set[str]]:
    """Returns every loss that was noted of a step, by any process in any of its lives."""
    found = collections.defaultdict(set)
    for file in pathlib.Path(directory).glob("losses-*"):
        for line in file.read_text().splitlines():
            step, _, loss = line.partition(" ")
            found[int(step)].add(loss)
    return dict(found)


def demo(n: int, n_steps: int, above: str, *, machines: bool) -> None:
    undisturbed = tempfile.mkdtemp(prefix="undisturbed-", dir=above)
    directory = tempfile.mkdtemp(prefix="killed-", dir=above)
    memory = tempfile.mkdtemp(prefix="lazy-", dir="/dev/shm")
    os.rmdir(memory)  # The keepers make their own.
    flags = ["--steps", str(n_steps), "--memory", memory, *["--machines"] * machines]
    flags.append("--directory")
    print(f"{n} process{'es' * (n > 1)}, undisturbed", flush=True)
    assert run(n, [*flags, undisturbed]) == [0] * n
    for when, who in ((n_steps // 3, "one"), (2 * n_steps // 3, "all"), (n_steps, "nobody")):
        print(f"after step {when}, kill -9: {who}", flush=True)
        ended = run(n, [*flags, directory, "--kill", str(when), who])
        assert all(ended) == (who != "nobody"), ended
        if machines and who != "nobody":
            print(f"machine {n - 1} is gone, with its memory", flush=True)
            shutil.rmtree(memory_of(memory, n - 1))
    assert not glob.glob(f"{memory}*"), "a clean end leaves nothing"
    wanted, found = losses_of(undisturbed), losses_of(directory)
    assert sorted(wanted) == list(range(n_steps))
    assert found == wanted, "the losses differ"
    assert all(len(losses) == 1 for losses in found.values())
    print(f"{n_steps} losses are equal, bit for bit, to those of a run that was never killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--directory", default="runs/outlive")
    add("--steps", type=int, default=30)
    add("--processes", type=int, default=4, help="so many, from 1; with --machines from 2")
    add("--machines", action="store_true", help="each process plays a machine")
    add("--memory", help=argparse.SUPPRESS)
    add("--kill", nargs=2, default=("-1", "nobody"), help=argparse.SUPPRESS)
    add("--join", nargs=3, metavar=("ADDRESS", "COUNT", "INDEX"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    least = 2 if arguments.machines else 1
    if arguments.processes < least:
        why = ": one machine alone has nobody to keep parity" if arguments.machines else ""
        parser.error(f"--processes must be at least {least}{why}")
    directory = os.path.abspath(arguments.directory)
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    if arguments.join is None:
        demo(arguments.processes, arguments.steps, directory, machines=arguments.machines)
        return
    address, count, index = arguments.join
    jax.distributed.initialize(address, int(count), int(index), heartbeat_timeout_seconds=10)
    when, who = arguments.kill
    kill = (int(when), who)
    train(directory, arguments.memory, arguments.steps, kill, machines=arguments.machines)


if __name__ == "__main__":
    main()
