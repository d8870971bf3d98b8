"""How members of a group ask each other, by gRPC: a short question, or for a chunk of bytes.

gRPC was chosen by measurement (`benchmarks/parity.py`): it has deadlines, limits to the size of a
message before memory is taken for it, and TLS. A server does nothing for one who does not know the
secret. Each chunk is a call of its own: a call that streams was seen to hang for good, deadline or
not, when its server ended (grpcio 1.85). This module alone imports gRPC.
"""

from __future__ import annotations

import concurrent.futures
import functools
import pathlib
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from lazy_orbax.errors import KeeperError
from lazy_orbax.integrity.digest import digest_of_bytes
from lazy_orbax.tiers.parity import proof

CHUNK_BYTES = 2**20
"""Of bytes that are sent, at once."""
_LONGEST_BYTES = 2**16
_SERVICE, _ASK, _READ = "lazy_orbax.Parity", "Ask", "Read"
_THREADS = 32
# So many chunks are asked for before the first has come.
_AHEAD = 2
# Beyond its deadline a call is given up, whatever gRPC says.
_GRACE_S = 1.0
_HEAD = struct.Struct("<H")
_COMMON = (
    ("grpc.enable_http_proxy", 0),
    # A connection whose other end is gone without a word is found out.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
Told = dict[str, Any]
Tls = tuple[str, str, str]


class Server:
    """Answers members of a group, on one interface.

    Attributes:
        address: where, as `host:port`.
    """

    def __init__(
        self,
        host: str,
        secret: str,
        tls: Tls | None,
        answer: Callable[[Told], Told],
        read: Callable[[Told, int, int], memoryview],
    ):
        """Listens.

        Args:
            host: the address of the interface.
            secret: what whoever asks must know.
            tls: paths of certificate, key and authority.
            answer: answers a question. A `KeeperError` is told to who asks.
            read: returns bytes of what is asked for: from where, and where they end.

        Raises:
            KeeperError: nobody can listen there.
        """
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "lazy_orbax-parity")
        options = (
            *_COMMON,
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _LONGEST_BYTES),
            ("grpc.max_concurrent_streams", _THREADS),
        )
        self._server = grpc.server(
            self._pool, options=options, maximum_concurrent_rpcs=2 * _THREADS
        )
        answers = {
            _ASK: functools.partial(_answered, answer),
            _READ: functools.partial(_part, read),
        }
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                functools.partial(_reply, secret, method, work)
            )
            for method, work in answers.items()
        }
        handler = grpc.method_handlers_generic_handler(_SERVICE, handlers)
        self._server.add_generic_rpc_handlers((handler,))
        where = f"[{host}]:0" if ":" in host else f"{host}:0"
        try:
            port = self._open(where, tls)
        except RuntimeError as error:
            raise KeeperError(f"nobody can listen on {host}: {error}") from error
        self.address = f"{where.rpartition(':')[0]}:{port}"
        self._server.start()

    def _open(self, where: str, tls: Tls | None) -> int:
        if tls is None:
            return self._server.add_insecure_port(where)
        certificate, key, authority = (pathlib.Path(path).read_bytes() for path in tls)
        credentials = grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=authority, require_client_auth=True
        )
        return self._server.add_secure_port(where, credentials)

    def close(self) -> None:
        """Ends every call, and listens no more."""
        self._server.stop(None).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _reply(
    secret: str,
    method: str,
    work: Callable[[Told], tuple[Told, bytes | memoryview]],
    request: bytes,
    context: Any,
) -> bytes:
    try:
        told = proof.opened(secret, method.encode(), request)
    except proof.NotProvenError as error:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        raise
    try:
        found, chunk = work(told)
    except (KeeperError, OSError, KeyError, TypeError, ValueError) as error:
        found, chunk = {"error": str(error) or repr(error)}, b""
    head = proof.sealed(secret, proof.code_of(request), found)
    return b"".join((_HEAD.pack(len(head)), head, chunk))


def _answered(answer: Callable[[Told], Told], told: Told) -> tuple[Told, bytes]:
    return answer(told), b""


def _part(read: Callable[[Told, int, int], memoryview], told: Told) -> tuple[Told, memoryview]:
    first, end = int(told["first"]), int(told["end"])
    if not 0 <= first <= end <= first + CHUNK_BYTES:
        raise KeeperError(f"bytes {first} to {end} are wanted, and {CHUNK_BYTES} at once at most")
    chunk = read(told, first, end)
    return {"digest": digest_of_bytes(chunk)}, chunk


class Peer:
    """Another member, or whoever is at its address."""

    def __init__(self, address: str, secret: str, tls: Tls | None):
        """Connects when it is asked something."""
        self._secret, self.address = secret, address
        options = (*_COMMON, ("grpc.max_receive_message_length", CHUNK_BYTES + _LONGEST_BYTES))
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
            return
        certificate, key, authority = (pathlib.Path(path).read_bytes() for path in tls)
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        self._channel = grpc.secure_channel(address, credentials, options=options)

    def _call(self, method: str, told: Told, timeout_s: float) -> tuple[bytes, Any]:
        told = {**told, "once": secrets.token_hex(8)}
        request = proof.sealed(self._secret, method.encode(), told)
        call = self._channel.unary_unary(f"/{_SERVICE}/{method}")
        return request, call.future(request, timeout=timeout_s)

    def _answer(self, request: bytes, call: Any, timeout_s: float) -> tuple[Told, memoryview]:
        """Waits for what comes of a call. Returns what is said, and the chunk behind it."""
        try:
            message = call.result(timeout=timeout_s + _GRACE_S)
        except grpc.RpcError as error:
            raise self._failed(error) from error
        except grpc.FutureTimeoutError as error:
            raise KeeperError(f"{self.address} did not answer within {timeout_s:.0f} s") from error
        begin = _HEAD.size
        end = begin + (_HEAD.unpack_from(message)[0] if len(message) >= begin else 0)
        try:
            answer = proof.opened(self._secret, proof.code_of(request), message[begin:end])
        except proof.NotProvenError as error:
            raise KeeperError(f"{self.address} is no member: {error}") from error
        if "error" in answer:
            raise KeeperError(f"{self.address} says: {answer['error']}")
        return answer, memoryview(message)[end:]

    def ask(self, told: Told, *, timeout_s: float) -> Told:
        """Returns the answer to a question.

        Raises:
            KeeperError: it refused, does not know the secret, or did not answer in time.
        """
        return self._answer(*self._call(_ASK, told, timeout_s), timeout_s)[0]

    def read(self, told: Told, n_bytes: int, *, timeout_s: float) -> Iterator[memoryview]:
        """Yields the bytes that are asked for, in turn, in chunks.

        Args:
            told: which bytes.
            n_bytes: how many they are.
            timeout_s: most seconds for all of them.

        Raises:
            KeeperError: as for `ask`; or what came is not what was sent.
        """
        end_s = time.monotonic() + timeout_s
        under_way: deque[tuple[int, bytes, Any]] = deque()
        firsts = iter(range(0, n_bytes, CHUNK_BYTES))
        try:
            for first in firsts:
                end = min(first + CHUNK_BYTES, n_bytes)
                more = {**told, "first": first, "end": end}
                left_s = max(0.0, end_s - time.monotonic())
                under_way.append((end - first, *self._call(_READ, more, left_s)))
                if len(under_way) >= _AHEAD:
                    yield self._chunk(*under_way.popleft(), end_s)
            while under_way:
                yield self._chunk(*under_way.popleft(), end_s)
        finally:
            for _, _, call in under_way:
                call.cancel()

    def _chunk(self, n_bytes: int, request: bytes, call: Any, end_s: float) -> memoryview:
        answer, chunk = self._answer(request, call, max(0.0, end_s - time.monotonic()))
        if len(chunk) != n_bytes or answer.get("digest") != digest_of_bytes(chunk):
            raise KeeperError(f"what came from {self.address} is not what was asked for")
        return chunk

    def _failed(self, error: grpc.RpcError) -> KeeperError:
        code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
        details = error.details() if isinstance(error, grpc.Call) else str(error)
        return KeeperError(f"{self.address} does not answer as a member ({code}): {details}")

    def close(self) -> None:
        """Hangs up."""
        self._channel.close()
