"""Machines on this one, each with processes, a network and memory of its own. They can be lost.

Nothing here waits for a while: a node tells of each stage of its work, and goes on when it may.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Listener
from typing import Any

import pytest
from equipment import hosts_zygote

_TESTS = pathlib.Path(__file__).parents[1]
_ANSWER_S = 120
_CHILDREN = "equipment.hosts_zygote.Children"


class Process:
    """A process on a machine. Its methods may be called from any thread; it does one at a time."""

    def __init__(self, connection: Connection, machine: int, child: int | None = None):
        self._connection, self._machine, self.child = connection, machine, child
        self._lock = threading.Lock()

    def does(self, where: str, method: str, *arguments: Any) -> Any:
        """Returns what a method of an object in that process returns; raises what it raises."""
        with self._lock:
            self._connection.send((where, method, arguments))
            assert self._connection.poll(_ANSWER_S), f"{method} hangs on machine {self._machine}"
            answer, error = self._connection.recv()
        if error is not None:
            raise error
        return answer


class Host:
    """A machine. When it dies, its processes do, and its memory and its address go."""

    def __init__(self, network: Network, number: int, first: Process):
        self.number, self.address = number, hosts_zygote.address_of(number)
        self.other_address = hosts_zygote.address_of(number, 1)
        self._network, self._first = network, first

    def does(self, where: str, method: str, *arguments: Any) -> Any:
        """Returns what a method of an object in its first process returns."""
        return self._first.does(where, method, *arguments)

    def process(self) -> Process:
        """Starts one more process on it."""
        return self._network.started(self.number, lambda: self.does(_CHILDREN, "start"))

    def kill(self, process: Process) -> None:
        """Ends a process on it at once."""
        self.does(_CHILDREN, "kill", process.child)

    def die(self) -> None:
        """Ends all of its processes at once, and takes its memory and its address away."""
        self._network.told("die", host=self.number)

    def freeze(self) -> None:
        """Stops all of its processes, which do nothing any more, and do not end."""
        self._network.told("freeze", host=self.number)

    def thaw(self) -> None:
        """Lets them go on."""
        self._network.told("thaw", host=self.number)

    def cut(self, link: int = 0, *, is_seen: bool = False) -> None:
        """Lets nothing through to it or from it: silently, or with its link down."""
        self._network.told("cut", host=self.number, link=link, is_seen=is_seen)

    def heal(self, link: int = 0) -> None:
        """Lets everything through again."""
        self._network.told("heal", host=self.number, link=link)


class Network:
    """A switch with machines.

    Attributes:
        reached: called with the number of a machine, and the stage that its node has reached,
            before the node goes on. May return by how many seconds the node's clock is set on.
    """

    def __init__(self, place: str, modules: Sequence[str], variables: Mapping[str, str]):
        self.reached: Callable[[int, str], float | None] = lambda *_: None
        self._listener = Listener(f"{place}/network", "AF_UNIX")
        self._errors = open(f"{place}/errors", "w+")  # noqa: SIM115 - It is read at the end.
        self._lock, self._numbers = threading.Lock(), 0
        self._coming: dict[int, concurrent.futures.Future[Connection]] = {}
        roots = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
        # Threads of NumPy's do not survive a fork.
        few = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._zygote = subprocess.Popen(
            [
                *_apart(),
                sys.executable,
                "-m",
                "equipment.hosts_zygote",
                f"{place}/network",
                *modules,
            ],
            env={**os.environ, **few, "PYTHONPATH": os.pathsep.join(filter(None, roots))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        threading.Thread(target=self._accept, daemon=True).start()
        self._hear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()
                kind, number = connection.recv()
                if kind == "process":
                    self._coming.pop(number).set_result(connection)
                else:
                    listen = functools.partial(self._listen, connection, number)
                    threading.Thread(target=listen, daemon=True).start()

    def _listen(self, connection: Connection, number: int) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                stage = connection.recv()
                # As it is now, not before the wait.
                connection.send(self.reached(number, stage))

    def told(self, what: str, **arguments: Any) -> None:
        with self._lock:
            print(json.dumps([what, arguments]), file=self._zygote.stdin, flush=True)
            self._hear()

    def _hear(self) -> None:
        assert self._zygote.stdout is not None
        if not self._zygote.stdout.readline():
            self._errors.seek(0)
            raise AssertionError(self._errors.read())

    def host(self) -> Host:
        """Returns a new machine, at a new address."""
        with self._lock:
            self._numbers += 1
            number = self._numbers
        return Host(self, number, self.started(number, lambda: self.told("start", host=number)))

    def started(self, machine: int, start: Callable[[], int | None]) -> Process:
        """Starts a process on a machine: one at a time on each."""
        coming = self._coming[machine] = concurrent.futures.Future()
        child = start()
        return Process(coming.result(_ANSWER_S), machine, child)

    def close(self) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._listener.close()
        self._zygote.stdin.close()
        self._zygote.wait(_ANSWER_S)
        self._zygote.stdout.close()
        self._errors.close()


def _apart() -> list[str]:
    return ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--net"]


@functools.cache
def why_none() -> str | None:
    """Returns why there can be no such machines here."""
    work = (
        "ip link add sw0 type bridge && ip link add v0 master sw0 type veth peer name v1 && "
        "mount -t proc proc /proc && mount -t tmpfs memory /dev/shm"
    )
    command = [*_apart(), "--mount", "--uts", "--pid", "--fork", "sh", "-c", work]
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "ip"))):
        return "there are no namespaces here, or neither `unshare` nor `ip`"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


@contextlib.contextmanager
def network(*modules: str, **variables: str) -> Iterator[Network]:
    """Yields a network, which ends with the block; skips the test where there can be none.

    Args:
        *modules: what machines will import.
        **variables: of their environment, beside the usual ones.
    """
    if (why := why_none()) is not None:
        pytest.skip(f"no machines can be made here: {why}")
    place = tempfile.mkdtemp(prefix="lo-")
    found = Network(place, modules, variables)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(place)
