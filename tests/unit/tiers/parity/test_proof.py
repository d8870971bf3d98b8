"""Only who knows the secret makes a message that is believed, and only for what it is about."""

import pytest

from lazy_orbax.tiers.parity.proof import (
    CODE_BYTES,
    NotProvenError,
    code_of,
    new_secret,
    opened,
    sealed,
)


def test_a_message_says_what_was_told():
    message = sealed("s", b"Ask", {"a": [1]})
    assert opened("s", b"Ask", message) == {"a": [1]}
    assert code_of(message) == message[:CODE_BYTES]


@pytest.mark.parametrize(("secret", "context"), [("t", b"Ask"), ("s", b"Fetch"), ("s", b"")])
def test_with_another_secret_or_for_another_thing_it_says_nothing(secret, context):
    with pytest.raises(NotProvenError, match="secret"):
        opened(secret, context, sealed("s", b"Ask", {}))


def test_every_bit_counts():
    message = sealed("s", b"", {"step": 1})
    for bit in range(8 * len(message)):
        wrong = bytearray(message)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(NotProvenError):
            opened("s", b"", bytes(wrong))


@pytest.mark.parametrize("message", [b"", b"short", bytes(CODE_BYTES), bytes(10**6)])
def test_what_is_no_message_is_refused(message):
    with pytest.raises(NotProvenError):
        opened("s", b"", message)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"[" * 10**5])
def test_who_knows_the_secret_and_talks_nonsense_is_refused(content, monkeypatch):
    monkeypatch.setattr("json.dumps", lambda _: content.decode())
    message = sealed("s", b"", {})
    monkeypatch.undo()
    with pytest.raises(NotProvenError, match="a message is"):
        opened("s", b"", message)


def test_secrets_differ():
    assert len({new_secret() for _ in range(10)}) == 10
