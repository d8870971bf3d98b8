"""What child processes do: a training job on `gs://` that obeys commands."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import pathlib
import time
import traceback
from typing import Any

import gcsfs  # Slow; here it is imported once for all processes.
import google.cloud.storage  # noqa: F401
import jax
import numpy as np
import orbax.checkpoint as ocp
from equipment.machines import machines, promoted
from equipment.pods import states
from equipment.training import SLAB_BYTES, Steps, make_state
from equipment.trees import abstract, all_bits, random_array
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lazy_orbax
from lazy_orbax.cli.main import main
from lazy_orbax.handlers.promoting import promote
from lazy_orbax.snapshot.host_budget import HOST_BUDGET
from lazy_orbax.tiers.tier import Machine

__all__ = ["Job", "serve"]


def state_of(mesh: jax.sharding.Mesh, seed: int) -> dict[str, Any]:
    """Returns a state of two slabs, of bits that depend on `seed`."""
    rng = np.random.default_rng(seed)

    def on_mesh(array: np.ndarray, *spec: Any) -> jax.Array:
        # Not `device_put`: with several processes it compares what each has, and NaNs differ.
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {
        "w": on_mesh(random_array(rng, (512, 640), np.float32), "a", "b"),
        "v": on_mesh(random_array(rng, (64, 128), np.float32), "a"),
        "replicated": on_mesh(random_array(rng, (33, 5), np.float32)),
        "key": jax.random.wrap_key_data(on_mesh(random_array(rng, (2,), np.uint32))),
        "step": seed,
    }


def leaves_of(mesh: jax.sharding.Mesh, n: int) -> dict[str, Any]:
    """Returns a state of `n` leaves that look alike."""
    sharding, rng = NamedSharding(mesh, P("a")), np.random.default_rng(n)
    values = [random_array(rng, (64, 64), np.float32) for _ in range(n)]
    return {f"leaf_{i:03}": jax.device_put(value, sharding) for i, value in enumerate(values)}


class Job:
    """A training process. Every public method is a command."""

    def __init__(self) -> None:
        self._manager: ocp.CheckpointManager | None = None

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 2), ("a", "b"))

    def open(
        self, path: str, *, timeout_s: float = 300.0, stock: bool = False, **keywords: Any
    ) -> list[int]:
        """Opens a manager, in the place of the last one. Returns the steps that are committed."""
        self.close()
        if stock:
            handler = ocp.StandardCheckpointHandler()
        else:
            options = lazy_orbax.LazyOptions(
                slab_bytes=SLAB_BYTES,
                storage_timeout_s=timeout_s,
            )
            handler = lazy_orbax.standard_handler(options=options, **keywords)
        self._manager = ocp.CheckpointManager(path, item_handlers=handler)
        return self.steps()

    def close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    @property
    def manager(self) -> ocp.CheckpointManager:
        assert self._manager is not None
        return self._manager

    def steps(self) -> list[int]:
        return list(self.manager.all_steps(read=True))

    def save(self, step: int, *, seed: int | None = None, **keywords: Any) -> None:
        """Saves the state of `step`, or of `seed`, and waits until it is committed."""
        state = state_of(self._mesh, step if seed is None else seed)
        self.manager.save(step, args=ocp.args.StandardSave(state), **keywords)
        self.manager.wait_until_finished()

    def wrong(self, *steps: int, seed: int | None = None) -> list[str]:
        """Returns which leaves of these steps are not restored bit for bit."""
        wrong = []
        for step in steps:
            wanted = state_of(self._mesh, step if seed is None else seed)
            target = ocp.args.StandardRestore(abstract(wanted))
            found = all_bits(self.manager.restore(step, args=target))
            pairs = zip(found, all_bits(wanted), strict=True)
            wrong += [f"{step}: {a[0]}" for a, b in pairs if a != b]
        return wrong

    def merge(self, out: str, *sources: str) -> list[str]:
        """Merges two checkpoints. Returns which floats are wrong, and what `verify` says."""
        lazy_orbax.merge(sources, [0.25, 0.5], out, others=0)
        a, b, found = (lazy_orbax.load(path) for path in (*sources, out))
        with np.errstate(all="ignore"):
            wrong = [
                name
                for name in ("w", "v", "replicated")
                if not np.array_equal(
                    np.float32(0.25) * a[name] + np.float32(0.5) * b[name],
                    found[name],
                    equal_nan=True,
                )
            ]
        return [*wrong, *map(str, lazy_orbax.verify(out).all_problems)]

    def keep(self, run: str, directory: str, step: int) -> None:
        """Keeps the state of a step in memory, and ends without removing it."""
        keeper = lazy_orbax.Keeper(run, directory=directory)
        keeper.save(step, state_of(self._mesh, step))
        keeper.wait()
        assert keeper.report.newest_step == step
        keeper.close(discard=False)

    def promote(self, run: str, directory: str, tier: str) -> int | None:
        """Brings what is kept to a tier that keeps one step."""
        return promote(run, lazy_orbax.Tier(tier, every_s=1, keep=1), directory)

    def promote_together(self, run: str, directory: str, tier: str, n: int) -> list[Any]:
        """Brings what is kept to a tier, as so many machines with a part of it each."""
        places = machines(pathlib.Path(directory).parent, directory, n)
        tiers = [lazy_orbax.Tier(tier, every_s=1, keep=1)] * n
        return [
            found if isinstance(found, int) else str(found)
            for found in promoted(run, tiers, places)
        ]

    def divide(self, directory: str, n: int) -> list[str]:
        """Returns the directories of so many machines with a part of what is kept each."""
        return machines(pathlib.Path(directory).parent, directory, n)

    def promote_part(self, run: str, place: str, tier: str, part: int, of: int) -> int | None:
        """Brings the part of one of so many machines to a tier, as the others do."""
        tier_of = lazy_orbax.Tier(tier, every_s=1, keep=1)
        return promote(run, tier_of, place, Machine((part,), of))

    def newest(self, run: str, directory: str, tier: str) -> tuple[int, str, list[str]]:
        """Returns the newest step, where it was, and which leaves are not what was kept."""
        tiers = [lazy_orbax.Tier(tier, every_s=1e6)]
        with (
            lazy_orbax.Keeper(run, directory=directory, tiers=tiers) as keeper,
            ocp.CheckpointManager(run) as manager,
        ):
            like = ocp.args.StandardRestore(abstract(state_of(self._mesh, 0)))
            found = lazy_orbax.restore_newest(manager, keeper, args=like)
        pairs = zip(all_bits(found.value), all_bits(state_of(self._mesh, found.step)), strict=True)
        return found.step, found.tier, [a[0] for a, b in pairs if a != b]

    def save_leaves(self, step: int, n: int) -> None:
        """Saves `leaves_of` the mesh."""
        self.manager.save(step, args=ocp.args.StandardSave(leaves_of(self._mesh, n)))
        self.manager.wait_until_finished()

    def wrong_leaves(self, step: int, n: int) -> list[str]:
        """Returns which leaves of such a step are not restored bit for bit."""
        wanted = leaves_of(self._mesh, n)
        found = self.manager.restore(step, args=ocp.args.StandardRestore(abstract(wanted)))
        pairs = zip(all_bits(found), all_bits(wanted), strict=True)
        return [a[0] for a, b in pairs if a != b]

    def objects(self, step: int) -> list[str]:
        """Returns the names of all objects of a step."""
        place = self._place_of(step)
        bucket, _, prefix = str(place).removeprefix("gs://").partition("/")
        found = gcsfs.GCSFileSystem(use_listings_cache=False).find(f"{bucket}/{prefix}")
        return [name.removeprefix(f"{bucket}/{prefix}/") for name in found]

    def problems(self, step: int) -> list[str]:
        """Returns what `verify` says of a step."""
        return list(map(str, lazy_orbax.verify(self._place_of(step)).all_problems))

    def warnings_while_restoring(self, step: int) -> list[str]:
        """Restores a step, which must be whole, and returns what was logged."""
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append
        logger = logging.getLogger("lazy_orbax")
        logger.addHandler(handler)
        try:
            assert self.wrong(step) == []
        finally:
            logger.removeHandler(handler)
        return [record.getMessage() for record in records]

    def changes_unnoticed(self, step: int, name: str, *, every: int) -> tuple[int, list[str]]:
        """Changes a bit in each so many bytes of a JSON file of a step, one after the other.

        Returns:
            How many, and what `verify` did not notice though the values had changed, but for the
            time of the commit.
        """
        file, late = self._place_of(step) / name, "commit_timestamp_nsecs"
        whole, unnoticed = file.read_bytes(), []
        for at in range(0, len(whole), every):
            changed = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
            file.write_bytes(changed)
            if not self.problems(step) and (
                {**json.loads(changed), late: 0} != {**json.loads(whole), late: 0}
            ):
                unnoticed.append(changed.decode())
        file.write_bytes(whole)
        return len(range(0, len(whole), every)), unnoticed

    def _place_of(self, step: int) -> epath.Path:
        return epath.Path(self.manager.directory) / str(step)

    def spoil(self, step: int, name: str, content: bytes) -> None:
        """Writes a file of a step again, with other content."""
        (self._place_of(step) / name).write_bytes(content)

    def tear(self, step: int) -> None:
        """Leaves a step as one whose save was killed before it was committed."""
        (epath.Path(self.manager.directory) / str(step) / "commit_success.txt").unlink()

    def command(self, *arguments: str) -> tuple[int, str]:
        """Returns the exit status and the output of `lazy-orbax`."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main([*arguments])
        return status, out.getvalue()

    def roll_back(self, step: int, by: int) -> None:
        """Puts the files of the item of another step in place of those of a step."""
        ours, theirs = (self._place_of(each) / "default" for each in (step, by))
        ours.rmtree()
        _copy(theirs, ours)

    def differences(self, step: int, n_steps: int) -> list[str]:
        """Returns what is not restored as the state after so many steps of `states`."""
        target = ocp.args.StandardRestore(states.targets(self._mesh, states.SPECS))
        found = self.manager.restore(step, args=target)
        return states.differences(found, states.values(n_steps))

    def train(self, n: int) -> list[str]:
        """Saves `n` steps, each state donated at once. Returns what stock Orbax restores wrong."""
        state = make_state(self._mesh)
        steps, wanted = Steps(state), []
        for step in range(n):
            wanted.append(all_bits(steps.bytes_of(state)))
            self.manager.save(step, args=ocp.args.StandardSave(state))
            state = steps.donating(steps.donating(state))
        self.manager.wait_until_finished()
        self.open(str(self.manager.directory), stock=True)
        found = [all_bits(self.manager.restore(step)) for step in self.steps()]
        return [f"{step}" for step in range(n) if found[step] != wanted[step]]

    def in_flight_bytes(self) -> int:
        return HOST_BUDGET.in_flight_bytes


def _copy(source: Any, target: Any) -> None:
    for child in source.iterdir():
        if child.is_dir():
            _copy(child, target / child.name)
        else:
            (target / child.name).write_bytes(child.read_bytes())


def serve(connection: Any) -> None:
    """Obeys commands until the other end closes."""
    job = Job()
    while True:
        try:
            name, arguments, keywords = connection.recv()
        except EOFError:
            return
        start_s = time.perf_counter()
        try:
            outcome: Any = ("ok", getattr(job, name)(*arguments, **keywords))
        except Exception as error:  # noqa: BLE001 - The test looks at it.
            outcome = ("error", (type(error).__name__, str(error), traceback.format_exc()))
        connection.send((*outcome, time.perf_counter() - start_s))
