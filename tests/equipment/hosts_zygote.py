"""A switch, and the program that forks machines onto it. It runs in a network of its own.

A machine is a namespace of each kind: its processes, its network, its name and its memory at
`/dev/shm`. Its first process serves the test; when that is killed, the kernel ends every other
process of the machine and takes its memory and its address away: nothing there answers any more.

Arguments: the socket of the test, and modules to import before the first machine. Each line of
standard input is a message in JSON, and each is answered by a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Client, Connection
from typing import Any

NETWORK, HOST = "LAZY_ORBAX_TEST_NETWORK", "LAZY_ORBAX_TEST_HOST"
_NEW_MOUNTS, _NEW_NAME, _NEW_PROCESSES, _NEW_NETWORK = 0x20000, 0x4000000, 0x20000000, 0x40000000
_RECURSIVE, _PRIVATE, _AGAIN = 0x4000, 0x40000, 0x20
_LIBC = ctypes.CDLL(None, use_errno=True)
_LINKS = ("eth0", "eth1")


def address_of(host: int, link: int = 0) -> str:
    """Returns the address of a machine on one of its two links."""
    return f"10.{88 + link}.{host // 200}.{host % 200 + 1}"


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(what: str, where: str, kind: str, flags: int = 0, options: str = "") -> None:
    words = (what.encode(), where.encode(), kind.encode())
    _checked(_LIBC.mount(*words, flags, options.encode()))


def _ip(*commands: str) -> None:
    subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True, capture_output=True
    )


class Switch:
    """What machines are connected to: one bridge for each of their links."""

    def __init__(self, network: str):
        self._network, self._pids = network, dict[int, tuple[int, int]]()
        bridges = [f"link add switch{i} type bridge" for i in range(len(_LINKS))]
        _ip(*bridges, *(f"link set switch{i} up" for i in range(len(_LINKS))))

    def start(self, host: int) -> None:
        """Forks a machine."""
        (is_apart, apart), (is_wired, wired), (pids, pid) = (os.pipe() for _ in range(3))
        outer = os.fork()
        if outer == 0:
            try:
                _LIBC.unshare(_NEW_MOUNTS | _NEW_NAME | _NEW_PROCESSES | _NEW_NETWORK)
                os.write(apart, b".")
                os.read(is_wired, 1)
                inner = os.fork()
                if inner == 0:
                    _begin(self._network, host)
                os.write(pid, str(inner).encode())
                os.waitpid(inner, 0)
            finally:
                os._exit(0)
        os.read(is_apart, 1)
        _ip(
            *(
                f"link add h{host}l{i} master switch{i} type veth peer name {name} netns {outer}"
                for i, name in enumerate(_LINKS)
            ),
            *(f"link set h{host}l{i} up" for i in range(len(_LINKS))),
        )
        os.write(wired, b".")
        self._pids[host] = outer, int(os.read(pids, 20))
        for end in (is_apart, apart, is_wired, wired, pids, pid):
            os.close(end)

    def die(self, host: int) -> None:
        """Ends a machine at once, with all that it has."""
        outer, inner = self._pids.pop(host)
        os.kill(inner, signal.SIGKILL)
        os.waitpid(outer, 0)
        # Its end goes with its network, which the kernel removes when it comes to it.
        for i in range(len(_LINKS)):
            subprocess.run(["ip", "link", "del", f"h{host}l{i}"], check=False, capture_output=True)

    def freeze(self, host: int) -> None:
        """Stops all processes of a machine. Its kernel goes on, and acknowledges what comes."""
        self._signal(host, signal.SIGSTOP)

    def thaw(self, host: int) -> None:
        """Lets them go on."""
        self._signal(host, signal.SIGCONT)

    def _signal(self, host: int, number: int) -> None:
        _, inner = self._pids[host]
        for pid in [inner, *(int(name) for name in os.listdir("/proc") if name.isdigit())]:
            # One may end meanwhile; and of some others nobody may know where they are.
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{inner}/ns/pid"):
                    os.kill(pid, number)

    def cut(self, host: int, link: int, *, is_seen: bool) -> None:
        """Lets nothing through to or from a machine. Where it `is_seen`, its link goes down."""
        _ip(f"link set h{host}l{link} {'down' if is_seen else 'nomaster'}")

    def heal(self, host: int, link: int) -> None:
        """Lets everything through again."""
        _ip(f"link set h{host}l{link} master switch{link}", f"link set h{host}l{link} up")


def _begin(network: str, host: int) -> None:
    """Is the first process of a machine."""
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)
    _mount("proc", "/proc", "proc")
    _mount("memory", "/dev/shm", "tmpfs")
    ups = [f"addr add {address_of(host, i)}/16 dev {link}" for i, link in enumerate(_LINKS)]
    _ip("link set lo up", *ups, *(f"link set {link} up" for link in _LINKS))
    # So that what looks for this machine by its name finds it.
    socket.sethostname(address_of(host))
    os.environ |= {NETWORK: network, HOST: str(host)}
    _serve_the_test()


def _serve_the_test() -> None:
    connection = Client(os.environ[NETWORK])
    connection.send(("process", int(os.environ[HOST])))
    serve(connection)
    os._exit(0)


class Addresses:
    """More addresses of a machine."""

    def add(self, address: str) -> None:
        """Adds one to its first link."""
        _ip(f"addr add {address} dev {_LINKS[0]} nodad")


class Memory:
    """The memory of a machine at `/dev/shm`."""

    def leave(self, n_bytes: int) -> None:
        """Takes all of it away but what is used, and so many bytes."""
        has = os.statvfs("/dev/shm")
        used = (has.f_blocks - has.f_bfree) * has.f_frsize
        _mount("memory", "/dev/shm", "tmpfs", _AGAIN, f"size={used + n_bytes}")


class Children:
    """More processes of a machine, which serve the test as the first one does."""

    def start(self) -> int:
        """Forks one. Returns its number."""
        if (child := os.fork()) == 0:
            try:
                _serve_the_test()
            finally:
                os._exit(1)
        return child

    def kill(self, child: int) -> None:
        """Ends one at once."""
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def serve(connection: Connection) -> None:
    """Does what the test says, with objects that it names, until it hangs up.

    Each message is the name of a class, of one of its methods, and what that takes. The first one
    for a class makes the object.
    """
    made: dict[str, Any] = {}
    while True:
        try:
            where, method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if where not in made:
                module, _, name = where.rpartition(".")
                made[where] = getattr(importlib.import_module(module), name)()
            connection.send((getattr(made[where], method)(*arguments), None))
        except Exception as error:  # noqa: BLE001 - The test raises it.
            connection.send((None, error))


def main(network: str, *modules: str) -> None:
    for module in modules:
        importlib.import_module(module)
    switch = Switch(network)
    print("{}", flush=True)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        getattr(switch, what)(**arguments)
        print("{}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
