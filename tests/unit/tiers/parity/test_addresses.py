"""Addresses of both families, names that have several, and what nobody reaches."""

import socket

import pytest

from lazy_orbax.errors import KeeperError
from lazy_orbax.tiers.parity import addresses
from lazy_orbax.tiers.parity.addresses import (
    bare,
    interface_towards,
    is_everywhere,
    own_addresses,
    with_port,
)


def test_the_interface_is_the_one_towards_the_coordinator():
    assert interface_towards("127.0.0.1:1234") == "127.0.0.1"
    assert interface_towards("localhost:1234") in ("127.0.0.1", "::1")
    assert interface_towards(None) == "127.0.0.1"
    with pytest.raises(KeeperError, match="Parity\\(host="):
        interface_towards("127.0.0.1")


RESOLVE = socket.getaddrinfo


def resolves_to(monkeypatch, *hosts):
    def found(host, port, *, type):
        return [one for each in hosts for one in RESOLVE(each, port, type=type)]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_of_several_addresses_it_is_one_to_which_something_leads(monkeypatch):
    """A machine without a way to all of IPv6 knows the address, and fails when it goes there."""
    resolves_to(monkeypatch, "203.0.113.1", "127.0.0.1")
    connects = socket.socket

    class Cut(connects):
        def connect(self, where):
            if where[0] != "127.0.0.1":
                raise OSError(101, "Network is unreachable")
            super().connect(where)

    monkeypatch.setattr(socket, "socket", Cut)
    assert interface_towards("coordinator:1234") == "127.0.0.1"
    resolves_to(monkeypatch, "203.0.113.1", "203.0.113.2")
    with pytest.raises(KeeperError, match="coordinator at both:1234.*unreachable"):
        interface_towards("both:1234")


def test_the_loopback_of_a_name_is_its_last_address(monkeypatch):
    resolves_to(monkeypatch, "::1", "127.0.1.1", "203.0.113.1", "2001:db8::1")
    found = [where[0] for _, where in own_addresses("me")]
    assert found == ["203.0.113.1", "2001:db8::1", "::1", "127.0.1.1"]


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("10.0.0.1", "10.0.0.1:5"), ("a.host", "a.host:5"), ("::1", "[::1]:5"),
        ("[::1]", "[::1]:5"), ("fe80::1%eth0", "[fe80::1%eth0]:5"),
    ],
)  # fmt: skip
def test_an_address_of_ipv6_has_brackets_before_a_port(host, place):
    assert with_port(host, 5) == place
    assert bare(place.removesuffix(":5")) == bare(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0::0"])
def test_an_address_of_all_interfaces_is_none_of_a_machine(host):
    assert is_everywhere(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%eth0", "a.host"])
def test_other_addresses_are(host):
    assert not is_everywhere(host)


def test_what_leads_to_a_link_names_it(monkeypatch):
    """An address of one link is none without it."""
    index, link = socket.if_nameindex()[0]
    end = ("fe80::1", 5, 0, index)
    monkeypatch.setattr(addresses, "_resolved", lambda *_: [(socket.AF_INET6, end)])

    class Probe:
        def __init__(self, *_):
            pass

        def connect(self, where):
            assert where == end

        def getsockname(self):
            return end

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(socket, "socket", Probe)
    assert interface_towards(f"[fe80::1%{link}]:5") == f"fe80::1%{link}"
