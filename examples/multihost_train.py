"""Trains on several processes with one global mesh, and checkpoints lazily from all of them.

    python examples/multihost_train.py --processes 2   # starts them on this machine, CPU only
    srun python examples/multihost_train.py            # or joins the job of Slurm, GKE, a TPU pod
    python examples/multihost_train.py --processes 2 --demo   # one is killed; the rest is resumed

On a pod each host runs this file, `jax.distributed.initialize()` finds the others, and
`--directory` is a place that all of them reach. Started again, on any number of processes, it
resumes from the newest committed step.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax

PyTree = Any
WIDTH, BATCH = 240, 48  # Many numbers divide them: so many devices share them.
OPTIMIZER = optax.adam(1e-2)


def spec_of(leaf: jax.ShapeDtypeStruct) -> P:
    """Splits matrices over all devices; the rest is on each of them."""
    return rows_spec(leaf.shape[0]) if leaf.ndim == 2 else P()


def rows_spec(n_rows: int) -> P:
    """Splits rows over all devices, if they divide; else each device has all of them."""
    return P("devices") if n_rows % jax.device_count() == 0 else P()


def init() -> PyTree:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "up": 0.1 * jax.random.normal(keys[0], (WIDTH, 4 * WIDTH)),
        "down": 0.1 * jax.random.normal(keys[1], (4 * WIDTH, WIDTH)),
        "bias": jnp.zeros(WIDTH),
    }
    return {"params": params, "adam": OPTIMIZER.init(params), "step": jnp.zeros((), jnp.int32)}


def train_step(state: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
    """Learns to reverse vectors. The state is donated."""

    def loss_of(params: PyTree) -> jax.Array:
        y = jax.nn.gelu(x @ params["up"]) @ params["down"] + params["bias"]
        return jnp.mean((y - x[:, ::-1]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, adam = OPTIMIZER.update(grads, state["adam"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "adam": adam, "step": state["step"] + 1}, loss


def batch_of(step: int, sharding: NamedSharding) -> jax.Array:
    """Each process makes only the rows that its devices need; the step alone decides them."""
    whole = np.random.default_rng(step).standard_normal((BATCH, WIDTH), dtype=np.float32)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def targets_of(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Says how to restore a state: by its shapes and dtypes, and any shardings."""

    def target(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(target, abstract, shardings)


def train(directory: str, n_steps: int, save_every: int, kill_at: int | None) -> None:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    abstract = jax.eval_shape(init)
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf)), abstract)
    step_fn = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=save_every,
        max_to_keep=2,
        # What a process that lost its job's others waits for, at most.
        async_options=ocp.AsyncOptions(timeout_secs=120),
        cleanup_tmp_directories=True,
    )
    handler = lazy_orbax.standard_handler()  # was: ocp.StandardCheckpointHandler()
    with (
        lazy_orbax.Preemption() as preemption,
        ocp.CheckpointManager(directory, item_handlers=handler, options=options) as manager,
    ):
        newest = manager.latest_step()
        if newest is None:
            state = jax.jit(init, out_shardings=shardings)()
        else:
            target = targets_of(abstract, shardings)
            state = manager.restore(newest, args=ocp.args.StandardRestore(target))
            say(f"resumed from step {newest} on {jax.process_count()} processes")
        rows = NamedSharding(mesh, rows_spec(BATCH))
        loss = None
        for step in range((newest or 0) + 1, n_steps + 1):
            # On CPU a process of several devices that is 32 steps ahead may stop for good: it
            # launches steps from the threads that run their collectives, as many as it has cores.
            jax.block_until_ready(loss)
            state, loss = step_fn(state, batch_of(step, rows))
            saved = False
            try:
                saved = manager.save(step, args=ocp.args.StandardSave(state))
            except lazy_orbax.errors.SaveError as error:
                # The same on every process, so all of them go on with the next step.
                say(f"went on without a checkpoint: {error}")
            if step == kill_at and jax.process_index() == jax.process_count() - 1:
                manager.wait_until_finished()  # So that the demo shows the same every time.
                os.kill(os.getpid(), signal.SIGKILL)
            if saved or step == n_steps:
                say(f"step {step}: loss {float(loss):.6f}")
            if preemption.reached(manager, step):
                last = preemption.last_save(manager, step, args=ocp.args.StandardSave(state))
                say(f"preempted; step {step} {'is' if last.committed else 'is not'} saved")
                return
        manager.wait_until_finished()
        say(f"done: steps {manager.all_steps()} are in {directory}")


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------- on one machine


def address_for_a_job() -> str:
    """Returns where the processes of a job on this machine can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def start(n: int, arguments: list[str]) -> list[int]:
    """Runs this file as `n` processes on this machine. Returns how they ended."""
    address = address_for_a_job()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "--join", address, str(n), str(i)],
            env=environment,
        )
        for i in range(n)
    ]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def demo(n: int, arguments: argparse.Namespace) -> None:
    """A job loses a process and ends; another of half as many processes goes on from there."""
    directory = tempfile.mkdtemp(prefix="demo-", dir=arguments.directory)
    flags = ["--directory", directory, "--steps", str(arguments.steps)]
    flags += ["--save-every", str(arguments.save_every)]
    print(f"{n} processes; the last is killed after step {arguments.steps - 1}", flush=True)
    ended = start(n, [*flags, "--kill-at", str(arguments.steps - 1)])
    assert ended[-1] == -signal.SIGKILL, ended
    assert all(ended), "nobody goes on without the process that was killed"
    print(f"{max(1, n // 2)} processes go on", flush=True)
    assert start(max(1, n // 2), flags) == [0] * max(1, n // 2)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        steps = list(manager.all_steps())
        abstract, here = jax.eval_shape(init), SingleDeviceSharding(jax.devices()[0])
        target = targets_of(abstract, jax.tree.map(lambda _: here, abstract))
        newest = manager.restore(steps[-1], args=ocp.args.StandardRestore(target))
    assert int(newest["step"]) == steps[-1]
    print(f"stock Orbax restores step {steps[-1]} in one process, without lazy_orbax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--directory", default="runs/multihost", help="shared by all processes, or gs://...")
    add("--steps", type=int, default=40)
    add("--save-every", type=int, default=10)
    add("--processes", type=int, help="start so many on this machine; without it, join a job")
    add("--demo", action="store_true")
    add("--kill-at", type=int, help=argparse.SUPPRESS)
    add("--join", nargs=3, metavar=("ADDRESS", "COUNT", "INDEX"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "://" not in arguments.directory:
        pathlib.Path(arguments.directory).mkdir(parents=True, exist_ok=True)
        arguments.directory = os.path.abspath(arguments.directory)
    if arguments.demo:
        demo(arguments.processes or 2, arguments)
    elif arguments.processes and not arguments.join:
        flags = ["--directory", arguments.directory, "--steps", str(arguments.steps)]
        flags += ["--save-every", str(arguments.save_every)]
        sys.exit(max(map(abs, start(arguments.processes, flags))))
    else:
        if arguments.join:
            address, count, index = arguments.join
            jax.distributed.initialize(
                address, int(count), int(index), heartbeat_timeout_seconds=10
            )
        else:
            jax.distributed.initialize()  # Slurm, GKE, Open MPI and TPU pods are recognized.
        train(arguments.directory, arguments.steps, arguments.save_every, arguments.kill_at)


if __name__ == "__main__":
    main()
