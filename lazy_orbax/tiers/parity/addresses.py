"""Names and addresses of machines, of IPv4 and of IPv6: where to listen, and towards whom."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from lazy_orbax.errors import KeeperError


def bare(host: str) -> str:
    """Returns a name or an address without the brackets that IPv6 has before a port."""
    return host.removeprefix("[").removesuffix("]")


def is_everywhere(host: str) -> bool:
    """Whether an address is that of all interfaces at once: nobody reaches a machine by it."""
    try:
        return ipaddress.ip_address(bare(host)).is_unspecified
    except ValueError:
        return False


def with_port(host: str, port: int) -> str:
    """Returns where others reach a port of a machine."""
    return f"[{bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def own_addresses(host: str) -> list[tuple[int, Any]]:
    """Returns the addresses that a name of this machine has, each with its family.

    What no other machine reaches comes last: the name of a machine often leads to its loopback.

    Raises:
        OSError: it has none.
    """
    found = _resolved(bare(host), 0, socket.SOCK_STREAM)
    return sorted(found, key=lambda one: _is_loopback(one[1][0]))


def interface_towards(address: str | None) -> str:
    """Returns the address by which this machine reaches another; nothing is sent.

    Args:
        address: `host:port`; `None` is nowhere, and the answer the loopback. Of a host that has
            several addresses, it is the first one to which something leads.

    Raises:
        KeeperError: nothing does.
    """
    if not address:
        return "127.0.0.1"
    host, _, port = address.rpartition(":")
    why: Exception | None = None
    try:
        for family, target in _resolved(bare(host) or "localhost", int(port), socket.SOCK_DGRAM):
            try:
                return _own_end(family, target)
            except OSError as error:
                why = error
    except (OSError, ValueError) as error:
        why = error
    raise KeeperError(
        f"no interface leads to JAX's coordinator at {address}: {why}; give `Parity(host=...)`"
    ) from why


def _own_end(family: int, target: Any) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        # With its scope, without which nobody listens at an address of one link.
        return socket.getnameinfo(probe.getsockname(), socket.NI_NUMERICHOST)[0]


def _resolved(host: str, port: int, kind: int) -> Iterator[tuple[int, Any]]:
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=kind):
        yield family, where
