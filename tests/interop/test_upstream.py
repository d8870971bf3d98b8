"""The tests that Orbax ships for checkpointers, unmodified, while `install()` holds."""

from __future__ import annotations

import types

import orbax.checkpoint as ocp
import pytest

import lazy_orbax
from lazy_orbax.handlers.v1 import lazy_v1

# Its trees come from chex, which Orbax itself does not require.
upstream = pytest.importorskip(
    "orbax.checkpoint._src.checkpointers.checkpointer_test_utils", exc_type=ImportError
)

NOT_OURS = {
    "test_memory_limiting0": "looks into the byte limiter of stock Orbax; ours is the host budget",
    "test_memory_limiting1": "looks into the byte limiter of stock Orbax; ours is the host budget",
    "test_save_with_failing_array_metadata_store_in_finalize": "expects two processes",
}


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.filterwarnings("ignore:jax.experimental.pjit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Mesh.*context manager:DeprecationWarning")
class Upstream:
    """What the two classes below share."""

    @pytest.fixture(autouse=True)
    def with_our_handlers(self, request, tmp_path):
        if reason := NOT_OURS.get(request.node.name):
            pytest.skip(reason)
        self.tmp_path = tmp_path
        with lazy_orbax.install():
            yield

    def create_tempdir(self, name):
        """Takes the place of absl's, which needs parsed flags and leaves its directories behind."""
        return types.SimpleNamespace(full_path=str(self.tmp_path / name))


class TestCheckpointer(Upstream, upstream.CheckpointerTestBase.Test):
    def checkpointer(self, handler, **kwargs):
        return ocp.Checkpointer(handler, **kwargs)


class TestAsyncCheckpointer(Upstream, upstream.CheckpointerTestBase.Test):
    def checkpointer(self, handler, **kwargs):
        return ocp.AsyncCheckpointer(handler, **kwargs)


# What it registers for its own types goes with its module.
upstream_v1 = pytest.importorskip(
    "orbax.checkpoint.experimental.v1._src.training.checkpointer_test_base", exc_type=ImportError
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestCheckpointerOfV1(upstream_v1.CheckpointerTestBase.Test):
    @pytest.fixture(autouse=True)
    def lazily(self, tmp_path):
        self.tmp_path = tmp_path
        undo = lazy_v1()
        yield
        undo()

    def create_tempdir(self, name):
        """Takes the place of absl's, as above."""
        return types.SimpleNamespace(full_path=str(self.tmp_path / name))
