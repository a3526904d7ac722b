"""Tests that need a CUDA device: `make gpu` runs them."""

from __future__ import annotations

import pytest
import torch

from fastcl.kernels.triton import plan


@pytest.fixture(params=["chunks", "owners"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How gradients of small embeddings are made: as of large ones, or by their owners."""
    if request.param == "chunks":
        monkeypatch.setattr(plan, "OWNED_DIM", {})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them all, and skips them where there is no device."""
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
