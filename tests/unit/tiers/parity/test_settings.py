"""What is wrong with an option is said before anything begins."""

import socket

import pytest

from lazy_orbax.errors import OptionError
from lazy_orbax.tiers.parity.settings import Parity


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": 1}, {"group": 33}, {"group": 2.5}, {"bytes_per_s": 5}, {"bytes_per_s": 1e9},
        {"timeout_s": 0}, {"timeout_s": "a"}, {"secret": "short"}, {"tls": ("a", "b")},
        {"host": "0.0.0.0"}, {"host": "::"},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_out_of_range_is_named(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Parity(**wrong)


def test_a_secret_is_not_printed():
    assert "sixteen" not in repr(Parity(secret="sixteen or more characters"))


def test_what_fails_as_a_whole_is_the_host_unless_it_is_said():
    assert Parity().domain_here == socket.gethostname()
    assert Parity(domain="rack 3").domain_here == "rack 3"
