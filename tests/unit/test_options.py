import dataclasses
import pathlib
import types

import pytest

import lazy_orbax
from lazy_orbax import LazyOptions, _machine
from lazy_orbax.errors import OptionError

MIB = 2**20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "fast"),
        ("mode", None),
        ("mode", ""),
        ("host_bytes", MIB - 1),
        ("host_bytes", 0),
        ("host_bytes", -MIB),
        ("host_bytes", 2.0 * MIB),
        ("host_bytes", "1GB"),
        ("host_bytes", True),
        ("slab_bytes", MIB - 1),
        ("slab_bytes", 0),
        ("slab_bytes", -1),
        ("slab_bytes", None),
        ("slab_bytes", 1e9),
        ("slab_bytes", True),
        ("write_bytes_per_s", MIB - 1),
        ("write_bytes_per_s", 1e9),
        ("write_bytes_per_s", True),
        ("storage_timeout_s", 0.5),
        ("storage_timeout_s", -1),
        ("storage_timeout_s", float("inf")),
        ("storage_timeout_s", float("nan")),
        ("storage_timeout_s", None),
        ("storage_timeout_s", "60"),
        ("storage_timeout_s", True),
        ("low_priority", 1),
        ("low_priority", None),
        ("on_timeline", 3),
        ("on_timeline", "print"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(field, value):
    with pytest.raises(OptionError) as raised:
        LazyOptions(**{field: value})
    assert f"{field}={value!r}" in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "auto"),
        ("mode", "stage"),
        ("mode", "direct"),
        ("host_bytes", None),
        ("host_bytes", MIB),
        ("slab_bytes", MIB),
        ("slab_bytes", 2**40),
        ("write_bytes_per_s", None),
        ("write_bytes_per_s", MIB),
        ("storage_timeout_s", 1),
        ("storage_timeout_s", 3600.0),
        ("low_priority", True),
        ("on_timeline", None),
        ("on_timeline", print),
    ],
)
def test_the_edge_of_each_range_is_accepted(field, value):
    assert getattr(LazyOptions(**{field: value}), field) == value


def test_replacing_a_field_validates_it_again():
    with pytest.raises(OptionError, match="slab_bytes=1 "):
        dataclasses.replace(LazyOptions(), slab_bytes=1)


def test_options_are_frozen_and_take_keywords_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LazyOptions().mode = "stage"  # type: ignore[misc]
    with pytest.raises(TypeError):
        LazyOptions("stage")  # type: ignore[misc]


def test_host_bytes_is_the_limit_where_it_is_given():
    assert LazyOptions(host_bytes=3 * MIB).host_limit_bytes == 3 * MIB


@pytest.mark.parametrize(
    ("limit_text", "expected_bytes"),
    [
        (f"{64 * MIB}\n", 32 * MIB),  # The container has less than the machine.
        ("max\n", 500 * MIB),  # No limit, as cgroup v2 writes it.
        (f"{2**63 - 4096}\n", 500 * MIB),  # No limit, as cgroup v1 writes it.
        (None, 500 * MIB),  # No cgroups at all.
    ],
)
def test_the_default_limit_is_half_of_the_memory_there_is(
    monkeypatch, tmp_path, limit_text, expected_bytes
):
    limit = pathlib.Path(tmp_path, "memory.max")
    if limit_text is not None:
        limit.write_text(limit_text)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000 * MIB // 4096}
    monkeypatch.setattr(_machine, "os", types.SimpleNamespace(sysconf=pages.__getitem__))
    monkeypatch.setattr(_machine, "_CGROUP_LIMITS", (str(limit),))
    assert LazyOptions().host_limit_bytes == expected_bytes


MAKERS = [
    lazy_orbax.LazyCheckpointHandler,
    lazy_orbax.pytree_handler,
    lazy_orbax.standard_handler,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("save_concurrent_gb", 0),
        ("save_concurrent_gb", "1"),
        ("save_device_host_concurrent_gb", -1),
        ("restore_concurrent_gb", 0),
        ("restore_concurrent_gb", -2),
        ("options", {"mode": "stage"}),
        ("options", "stage"),
    ],
)
def test_a_keyword_of_a_handler_out_of_range_is_named(make, field, value):
    with pytest.raises(OptionError) as raised:
        make(**{field: value})
    assert f"{field}={value!r}" in str(raised.value)


@pytest.mark.parametrize("make", MAKERS)
def test_an_unknown_keyword_is_refused(make):
    with pytest.raises(TypeError, match="no_such_option"):
        make(no_such_option=1)


@pytest.mark.parametrize(
    ("kwargs", "expected_bytes"),
    [
        ({"save_concurrent_gb": 2}, 2 * 10**9),
        ({"save_device_host_concurrent_gb": 3}, 3 * 10**9),
        ({"save_concurrent_gb": 5, "save_device_host_concurrent_gb": 3}, 3 * 10**9),
        ({"save_device_host_concurrent_gb": "auto"}, 4 * 10**9),
        ({"save_concurrent_gb": 9}, 4 * 10**9),
        ({"restore_concurrent_gb": 1}, 4 * 10**9),
    ],
)
def test_the_smallest_limit_counts(kwargs, expected_bytes):
    handler = lazy_orbax.LazyCheckpointHandler(options=LazyOptions(host_bytes=4 * 10**9), **kwargs)
    assert handler.limit_bytes == expected_bytes


@pytest.mark.parametrize(
    ("given", "expected_bytes"),
    [
        ({}, 64 * MIB),
        ({"slab_bytes": 7 * MIB}, 7 * MIB),
        ({"host_bytes": 40 * MIB}, 10 * MIB),
        ({"write_bytes_per_s": 8 * MIB}, 8 * MIB),
        ({"write_bytes_per_s": 8 * MIB, "host_bytes": MIB}, MIB // 4),
    ],
)
def test_a_slab_is_small_enough_for_the_budget_and_for_the_pace(given, expected_bytes):
    options = LazyOptions(**{"host_bytes": 4 * 10**9, **given})
    handler = lazy_orbax.LazyCheckpointHandler(options=options)
    assert handler._slab_bytes == expected_bytes
