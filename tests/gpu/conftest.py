"""Tests that need a CUDA device: `make gpu` runs them."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them all, and skips them where there is no device."""
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
