"""Trains a small language model with lazy checkpoints, and survives being killed in mid-save.

    python examples/train_lm.py               # trains; started again, it resumes
    python examples/train_lm.py --kill-at 30  # kills itself in the middle of the save of step 30
    python examples/train_lm.py --demo        # all of that, and proves that no bit was lost

The model is a Flax NNX transformer over bytes, trained with optax on the source files of the
running Python's standard library, so nothing is downloaded. Parameters and optimizer state are
sharded over all devices (eight emulated ones on a CPU), and the jitted step *donates* them: the
arrays that `save()` was given are gone one line later. The only line that is not stock Orbax is
the one that makes the handler.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

# Both are read when JAX starts: eight devices on a CPU, the same bits on every run on a GPU.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import lazy_orbax
from byte_transformer import Batches, ByteTransformer, standard_library_text

PyTree = Any


# ---------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions, and the shape, dtype and sharding of every array of the state."""

    init: Callable[[], PyTree]
    step: Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array]]
    abstract_state: PyTree
    batch_sharding: NamedSharding


def device_mesh() -> Mesh:
    devices = np.array(jax.devices())
    model = 2 if devices.size % 2 == 0 else 1
    return Mesh(devices.reshape(-1, model), ("data", "model"))


def partition(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Splits matrices over both mesh axes; biases, norms, the step and the key are replicated."""
    splits = leaf.ndim == 2 and all(n % m == 0 for n, m in zip(leaf.shape, mesh.devices.shape))
    return NamedSharding(mesh, PartitionSpec("data", "model") if splits else PartitionSpec())


def build_program() -> Program:
    mesh = device_mesh()
    optimizer = optax.adamw(3e-3)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ByteTransformer(nnx.Rngs(0))))

    def init() -> PyTree:
        params = nnx.state(ByteTransformer(nnx.Rngs(0)))
        step, key = jnp.zeros((), jnp.int32), jax.random.key(1)
        return {"params": params, "opt_state": optimizer.init(params), "step": step, "key": key}

    def loss_of(params: PyTree, batch: jax.Array, key: jax.Array) -> jax.Array:
        tokens = batch.astype(jnp.int32)
        logits = nnx.merge(graphdef, params)(tokens[:, :-1], nnx.Rngs(dropout=key))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: PyTree, batch: jax.Array) -> tuple[PyTree, jax.Array]:
        key, dropout_key = jax.random.split(state["key"])
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch, dropout_key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        next_step = state["step"] + 1
        return {"params": params, "opt_state": opt_state, "step": next_step, "key": key}, loss

    shapes = jax.eval_shape(init)
    shardings = jax.tree.map(lambda leaf: partition(leaf, mesh), shapes)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            shapes,
            shardings,
        ),
        batch_sharding=NamedSharding(mesh, PartitionSpec("data")),
    )


# ---------------------------------------------------------------- checkpoints


def report(timeline: lazy_orbax.SaveTimeline) -> None:
    """Prints the four moments of a save; runs on a background thread once the save has ended."""
    if timeline.error is not None:
        tqdm.write(f"save of step {timeline.step} failed: {timeline.error}")
        return
    moments = ("enqueued", "staged", "durable", "committed")
    seconds = [(name, getattr(timeline, f"{name}_s")) for name in moments]
    shown = " | ".join(f"{n} {'-' if s is None else f'{s * 1e3:.1f} ms'}" for n, s in seconds)
    size = f"{timeline.bytes_written / 1e6:.1f} MB, {timeline.mode}"
    tqdm.write(f"save of step {timeline.step}: {shown} ({size})")


def open_manager(
    directory: pathlib.Path, hold_commit: threading.Event | None = None
) -> ocp.CheckpointManager:
    """Opens the checkpoints; while `hold_commit` is set a finished save is not published."""

    def before_publishing() -> None:
        if hold_commit is not None and hold_commit.is_set():
            threading.Event().wait()  # for ever: the process is about to kill itself

    handlers = {
        "state": lazy_orbax.standard_handler(options=lazy_orbax.LazyOptions(on_timeline=report)),
        "data": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(
        max_to_keep=3,
        cleanup_tmp_directories=True,  # what a killed run left behind
        async_options=ocp.AsyncOptions(post_finalization_callback=before_publishing),
    )
    return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, batches: Batches) -> None:
    data = {"position": batches.position}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    manager.save(step, args=args)


def start_or_resume(
    manager: ocp.CheckpointManager, program: Program, batches: Batches
) -> tuple[int, PyTree]:
    """Returns the newest committed step and its state, or step 0 and a fresh state."""
    step = manager.latest_step()
    if step is None:
        return 0, program.init()
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(program.abstract_state),
        data=ocp.args.JsonRestore(),
    )
    restored = manager.restore(step, args=args)
    batches.position = restored["data"]["position"]
    assert int(restored["state"]["step"]) == step
    print(f"resumed from step {step}")
    return step, restored["state"]


def read_losses(directory: pathlib.Path) -> list[str]:
    """Returns the loss of every step from 1 on, as exact hexadecimal floats."""
    lines = (directory / "losses.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def forget_losses_after(directory: pathlib.Path, step: int) -> None:
    """Drops what an earlier run logged after the checkpoint that this run starts from."""
    path = directory / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    assert len(lines) >= step, f"{path} ends at step {len(lines)}, the checkpoint is of step {step}"
    path.write_text("".join(lines[:step]))


def die_in_mid_save(
    manager: ocp.CheckpointManager,
    hold_commit: threading.Event,
    program: Program,
    state: PyTree,
    batches: Batches,
) -> None:
    """Saves, lets the next step donate the saved arrays, and dies before the save is published."""
    manager.wait_until_finished()  # only this save shall be held back, not those before it
    hold_commit.set()
    step = int(state["step"])
    save(manager, step, state, batches)
    jax.block_until_ready(program.step(state, next_batch(program, batches)))
    assert not (manager.directory / str(step)).exists(), f"step {step} is already committed"
    tqdm.write(f"save of step {step}: enqueued, and killed before it is committed")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- main


def next_batch(program: Program, batches: Batches) -> jax.Array:
    return jax.device_put(next(batches), program.batch_sharding)


def train(args: argparse.Namespace) -> None:
    """Trains up to `args.steps`, from the newest committed checkpoint if there is one."""
    args.directory.mkdir(parents=True, exist_ok=True)
    program, batches = build_program(), Batches(standard_library_text())
    hold_commit = threading.Event()
    with (
        open_manager(args.directory / "checkpoints", hold_commit) as manager,
        open(args.directory / "losses.jsonl", "a", buffering=1) as losses,
    ):
        start, state = start_or_resume(manager, program, batches)
        forget_losses_after(args.directory, start)
        steps = range(start + 1, args.steps + 1)
        progress = tqdm(steps, "training", args.steps, initial=start, mininterval=1)
        for step in progress:
            state, loss = program.step(state, next_batch(program, batches))
            losses.write(json.dumps({"step": step, "loss": float(loss).hex()}) + "\n")
            progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            if step == args.kill_at:
                die_in_mid_save(manager, hold_commit, program, state, batches)
            if step % args.save_every == 0:
                save(manager, step, state, batches)
    loss = float.fromhex(read_losses(args.directory)[-1])
    print(f"trained to step {args.steps}, loss {loss:.3f}")


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Whether two trees hold the same bytes; a typed PRNG key counts as the numbers it holds."""

    def raw(leaf: jax.Array) -> bytes:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return jax.tree.all(jax.tree.map(lambda x, y: raw(x) == raw(y), a, b))


def newest_state_by_stock_orbax(directory: pathlib.Path, program: Program) -> PyTree:
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        newest = directory / "checkpoints" / str(manager.latest_step()) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(newest, program.abstract_state)


def demo(args: argparse.Namespace) -> None:
    """Trains once without a break and once killed and resumed; asserts that the bits are equal."""
    args.directory.mkdir(parents=True, exist_ok=True)
    home = pathlib.Path(tempfile.mkdtemp(prefix="demo-", dir=args.directory))
    whole, broken = home / "uninterrupted", home / "killed_and_resumed"

    def run(directory: pathlib.Path, *flags: str) -> int:
        size = ["--steps", str(args.steps), "--save-every", str(args.save_every)]
        command = [sys.executable, __file__, "--directory", str(directory), *size, *flags]
        return subprocess.run(command, check=False).returncode

    print("--- a run that nothing disturbs", flush=True)
    assert run(whole) == 0
    print(f"--- a run that is killed in the middle of the save of step {args.kill_at}", flush=True)
    status = run(broken, "--kill-at", str(args.kill_at))
    assert status == -signal.SIGKILL, f"the run to be killed ended with status {status}"
    assert not (broken / "checkpoints" / str(args.kill_at)).exists(), "the save was published"
    print("\n--- the killed run, started again", flush=True)
    assert run(broken) == 0

    losses = read_losses(whole)
    assert len(losses) == args.steps
    assert losses == read_losses(broken), "the resumed run took another path"
    program = build_program()
    states = [newest_state_by_stock_orbax(directory, program) for directory in (whole, broken)]
    assert same_bits(*states), "the last checkpoints differ"
    print(f"--- {args.steps} losses and the last checkpoint are equal, bit for bit")
    print(f"    stock Orbax read both checkpoints; they are in {home}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small language model, lazily saved.")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--save-every", type=int, default=5, metavar="K")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/train_lm"))
    parser.add_argument(
        "--kill-at", type=int, metavar="STEP", help="SIGKILL this process in the save of that step"
    )
    parser.add_argument(
        "--demo", action="store_true", help="compare an undisturbed run with a killed, resumed one"
    )
    args = parser.parse_args()
    args.directory = args.directory.absolute()
    if not 1 <= args.save_every <= args.steps:
        parser.error("--save-every must be between 1 and --steps")
    saves = range(args.save_every, args.steps + 1, args.save_every)
    if args.demo and args.kill_at is None:
        args.kill_at = saves[(len(saves) - 1) // 2]
    if args.kill_at is not None and args.kill_at not in saves:
        parser.error("--kill-at must be a multiple of --save-every, and at most --steps")
    return args


def main() -> None:
    args = parse_arguments()
    if args.demo:
        demo(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
