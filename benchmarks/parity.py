"""What moves parity: HTTP as it is used, beside a raw socket, and beside memcpy and XOR alone.

    python -m benchmarks.parity --megabytes 512 --repeats 5

Server and client are two processes on the loopback. Figures are GB/s, and the CPU seconds of both
for each GB. Two cores serve both sides here: between machines each side has its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np

from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity.peer import Peer
from lazy_orbax.tiers.parity.stripes import add
from lazy_orbax.tiers.parity.transport import CHUNK_BYTES, Server

SECRET = "of the benchmark alone"


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


def serve_http(pipe: Connection, n_bytes: int) -> None:
    content = content_of(n_bytes)

    def read(told: dict, first: int, end: int) -> tuple[int, memoryview]:
        return digest_of_bytes(content[first:end]), memoryview(content[first:end])

    server = Server("127.0.0.1", SECRET, None, lambda told: {}, read)
    began_s = cpu_s()
    pipe.send(server.address)
    pipe.recv()
    pipe.send(cpu_s() - began_s)
    server.close()


def over_http(where: str, n_bytes: int) -> Iterator[memoryview]:
    peer = Peer(where, SECRET, None)
    for chunk, _ in peer.read({}, n_bytes, timeout_s=600):
        yield chunk
    peer.close()


def moved(serve: Callable, fetch: Callable, n_bytes: int) -> tuple[float, float]:
    """Returns the seconds that it took, and the CPU seconds of both."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    child = spawn.Process(target=serve, args=(theirs, n_bytes))
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
        "HTTP, digests and XOR": lambda: moved(serve_http, over_http, n_bytes),
    }
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, measure in ways.items():  # In turn, so that they meet the same machine.
            samples[way].append(measure())
    print(f"{'':22} {'GB/s':>6} {'CPU s/GB':>9}")
    for way, found in samples.items():
        took_s, used_s = (statistics.median(column) for column in zip(*found))
        print(f"{way:22} {n_bytes / took_s / 1e9:6.2f} {used_s / n_bytes * 1e9:9.2f}")
    if arguments.out is not None:
        with arguments.out.open("a") as out:
            for way, found in samples.items():
                out.write(json.dumps({"way": way, "bytes": n_bytes, "samples": found}) + "\n")


if __name__ == "__main__":
    main()
