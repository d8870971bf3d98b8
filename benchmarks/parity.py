"""What moves parity: a node as it is, beside a raw socket, and beside memcpy and XOR alone.

    python -m benchmarks.parity --megabytes 512 --repeats 5

Server and client are two processes on the loopback; the server has a snapshot in `/dev/shm`. The
figures are GB/s, and the CPU seconds of both for each GB. Two cores serve both sides here: between
machines each side has its own. Then the same with limits of speed, and how near it comes to them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lazy_orbax.tiers.parity.files import Key
from lazy_orbax.tiers.parity.peer import Peer
from lazy_orbax.tiers.parity.serving import Serving
from lazy_orbax.tiers.parity.settings import NodeSettings
from lazy_orbax.tiers.parity.stripes import add
from lazy_orbax.tiers.parity.transport import CHUNK_BYTES, Server
from lazy_orbax.tiers.shelf import Shelf, file_of
from lazy_orbax.tiers.snapshot_file import PAGE_BYTES, SnapshotFile

SECRET, RUN, KEY = "of the benchmark alone", "/runs/benchmark", Key("default", 1, 1)
_LIMITS_MB = (50, 200, 400)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def content_of(n_bytes: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8)


def serve_socket(pipe: Connection, n_bytes: int) -> None:
    content = content_of(n_bytes)
    with socket.create_server(("127.0.0.1", 0)) as door:
        pipe.send(door.getsockname()[1])
        peer, _ = door.accept()
        with peer:
            began_s = cpu_s()
            for at in range(0, n_bytes, CHUNK_BYTES):
                peer.sendall(content[at : at + CHUNK_BYTES])
    pipe.send(cpu_s() - began_s)


def over_socket(where: int, n_bytes: int) -> Iterator[memoryview]:
    with socket.create_connection(("127.0.0.1", where)) as peer:
        chunk = memoryview(bytearray(CHUNK_BYTES))
        for at in range(0, n_bytes, CHUNK_BYTES):
            wanted, n = min(CHUNK_BYTES, n_bytes - at), 0
            while n < wanted:
                n += peer.recv_into(chunk[n:wanted])
            yield chunk[:wanted]


def serve_node(pipe: Connection, n_bytes: int, limit: int | None) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        shelf, file = Shelf(f"{place}/shelf"), file_of(RUN, KEY.item, 0, 0)
        end = PAGE_BYTES + n_bytes
        shelf.make_room(file, end + PAGE_BYTES, end + PAGE_BYTES)
        with contextlib.closing(SnapshotFile(shelf.path_of(file), end + PAGE_BYTES)) as opened:
            opened.memory[PAGE_BYTES:end] = content_of(n_bytes)
            facts = {"run": RUN, "process": 0, **dataclasses.asdict(KEY)}
            opened.seal(1, b"{}", json.dumps(facts).encode(), end=end)
        serving = Serving(NodeSettings(shelf.path, RUN, 0, SECRET, bytes_per_s=limit))
        server = Server("127.0.0.1", SECRET, None, serving.answer, serving.read)
        began_s = cpu_s()
        pipe.send(server.address)
        pipe.recv()
        pipe.send(cpu_s() - began_s)
        server.close()


def over_http(where: str, n_bytes: int) -> Iterator[memoryview]:
    peer = Peer(where, SECRET, None)
    told = {"what": "exchange", "process": 0, "n": 2, "owner": 0, "holder": 1}
    for chunk, _ in peer.read(told | dataclasses.asdict(KEY), n_bytes, timeout_s=600):
        yield chunk
    peer.close()


def moved(serve: Callable, fetch: Callable, n_bytes: int, *more: Any) -> tuple[float, float]:
    """Returns the seconds that it took, and the CPU seconds of both."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    child = spawn.Process(target=serve, args=(theirs, n_bytes, *more))
    child.start()
    where = mine.recv()
    target, at = np.ones(n_bytes, np.uint8), 0
    began_s, used_s = time.perf_counter(), cpu_s()
    for chunk in fetch(where, n_bytes):
        add(target, at, chunk)
        at += len(chunk)
    took_s, used_s = time.perf_counter() - began_s, cpu_s() - used_s
    assert at == n_bytes
    mine.send("done")
    used_s += mine.recv()
    child.join()
    return took_s, used_s


def in_memory(n_bytes: int) -> tuple[float, float]:
    """A copy and a XOR, chunk after chunk."""
    content, target = content_of(n_bytes), np.ones(n_bytes, np.uint8)
    chunk = np.ones(CHUNK_BYTES, np.uint8)
    began_s, used_s = time.perf_counter(), cpu_s()
    for at in range(0, n_bytes, CHUNK_BYTES):
        part = content[at : at + CHUNK_BYTES]
        np.copyto(chunk[: part.size], part)
        add(target, at, chunk[: part.size])
    return time.perf_counter() - began_s, cpu_s() - used_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="gets a line of JSON for each sample")
    arguments = parser.parse_args()
    n_bytes = arguments.megabytes * 10**6
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "memcpy and XOR": lambda: in_memory(n_bytes),
        "raw socket and XOR": lambda: moved(serve_socket, over_socket, n_bytes),
        "a node, with XOR": lambda: moved(serve_node, over_http, n_bytes, None),
    }
    limits = {f"a node, at {mb} MB/s": mb * 10**6 for mb in _LIMITS_MB}
    for way, limit in limits.items():
        ways[way] = functools.partial(moved, serve_node, over_http, n_bytes, limit)
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, measure in ways.items():  # In turn, so that they meet the same machine.
            samples[way].append(measure())
    print(f"{'':22} {'GB/s':>6} {'CPU s/GB':>9} {'of limit':>9}")
    for way, found in samples.items():
        took_s, used_s = (statistics.median(column) for column in zip(*found))
        line = f"{way:22} {n_bytes / took_s / 1e9:6.2f} {used_s / n_bytes * 1e9:9.2f}"
        if way in limits:
            ratios = [n_bytes / seconds / limits[way] for seconds, _ in found]
            line += f" {min(ratios):8.1%} to {max(ratios):.1%}"
        print(line)
    if arguments.out is not None:
        with arguments.out.open("a") as out:
            for way, found in samples.items():
                out.write(json.dumps({"way": way, "bytes": n_bytes, "samples": found}) + "\n")


if __name__ == "__main__":
    main()
