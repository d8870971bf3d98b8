"""Answers that processes share, with two processes of which one is made up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazy_orbax.pods import consensus

BEYOND = 2**40 + 1


@pytest.fixture
def other(monkeypatch):
    """Another process, which is the first: `other(ask)` is asked what it sends, then we are."""
    sent = []

    def together(ask_there, ask_here):
        def keep(array):
            with jax.enable_x64(False):  # JAX sends 32 bits of a 64-bit integer.
                sent.append(np.asarray(jnp.asarray(array)))
            return np.stack([sent[0], sent[-1]])

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(consensus.multihost_utils, "process_allgather", keep)
        monkeypatch.setattr(
            consensus.multihost_utils, "broadcast_one_to_all", lambda array: keep(array)[0]
        )
        ask_there()
        return ask_here()

    return together


def test_what_any_process_says_counts(other):
    flags = lambda *flags: lambda: consensus.any_process(flags)  # noqa: E731
    assert other(flags(True, False, False), flags(False, False, True)) == [True, False, True]


def test_nothing_is_asked_of_nothing():
    assert consensus.any_process([]) == []


@pytest.mark.parametrize("here", [False, True])
def test_the_processes_are_named(other, here):
    found = other(lambda: consensus.which_processes(True), lambda: consensus.which_processes(here))
    assert found == ([0, 1] if here else [0])


@pytest.mark.parametrize(("there", "here"), [(BEYOND, 3), (3, BEYOND), (-1, -BEYOND)])
def test_the_highest_counts(other, there, here):
    found = other(lambda: consensus.highest(there), lambda: consensus.highest(here))
    assert found == max(there, here)


@pytest.mark.parametrize(
    ("there", "found"),
    [([], []), ([0], [0]), ([BEYOND, 2, -1], [BEYOND, 2, -1]), ([5, 4, 3, 2, 1], [5, 4, 3])],
)
def test_the_first_process_says_which(other, there, found):
    asked = lambda numbers: lambda: consensus.from_first(numbers, most=3)  # noqa: E731
    assert other(asked(there), asked([9, 8])) == found


def test_one_process_agrees_with_itself():
    assert consensus.any_process([True, False]) == [True, False]
    assert consensus.which_processes(True) == [0]
    assert consensus.which_processes(False) == []
    assert consensus.highest(BEYOND) == BEYOND
    assert consensus.from_first([BEYOND, 3], most=1) == [BEYOND, 3]
