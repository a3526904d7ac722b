"""What all tests share: seeds, hypothesis profiles, and the streamed backends."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastcl.kernels.cpu.backend import missing_extension
from tests.cases import BACKENDS

# Examples are the same in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
_quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=25, derandomize=True, **_quiet)
settings.register_profile("explore", max_examples=500, **_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


_OF_LOSSES = ("functional", "similarity", "kernels", "losses", "compat")


@pytest.fixture(autouse=True)
def _setting(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed; and one thread, as threads that wait for each other are slow on busy cores.

    What depends on threads is tested with several where it is tested (tests/kernels).
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if request.path.parent.name in _OF_LOSSES:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Where the float64 rule does not hold yet, each listed in docs/performance.md under "Missed". Not
# strict: by how little it is missed depends on the processor's products.
_DOUBLE = "float64 is computed in base 2, which rounds once more than base e"
_ROUNDED_SCALE = "the scale enters G before the product, and rounds each of its terms"
_PAIRED = "an extra rounding of logits against positives that are not in the stream"
MISSED = {
    "test_nasty_embeddings[nt_xent-ids-none-torch.bfloat16-one-hot]": "a tie to the last digit",
    "test_loss_and_gradients[info_nce-queue-torch.float32-hot]": _PAIRED,
    "test_loss_and_gradients[info_nce-queue-torch.float64-separated]": _DOUBLE,
    "test_loss_and_gradients[info_nce-paired-torch.float64-many-tiles]": _DOUBLE,
    "test_loss_and_gradients[info_nce-paired-in_batch-torch.float64-separated]": _DOUBLE,
    "test_nasty_embeddings[info_nce-queue-torch.float32-one-hot]": _PAIRED,
    "test_many_tiles[info_nce-queue-513-7]": _PAIRED,
    "test_many_tiles[info_nce-queue-1025-3]": _PAIRED,
    "test_one_row_or_one_column[1-700-1-cols]": _ROUNDED_SCALE,
    "test_statistics_and_gradients[sigmoid-every-torch.float64-hot]": _DOUBLE,
    "test_statistics_and_gradients[sigmoid-every-rows-torch.float64-hot]": _DOUBLE,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the known misses of the float64 rule."""
    for item in items:
        reason = MISSED.get(item.name)
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each streamed backend that this machine can run."""
    name: str = request.param
    if name == "cpu" and missing_extension():
        pytest.skip(f"no compiled kernels to test: {missing_extension()}")
    return name


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what earlier tests left in its caches."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
