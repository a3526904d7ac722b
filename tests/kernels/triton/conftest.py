"""What of these tests can run here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from fastcl.kernels.triton.support import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton decides once, when kernels are defined, whether it interprets them."""
    for item in items:
        wants = item.get_closest_marker("interpreter") is not None
        if "kernels/triton" in str(item.path) and wants and not interpreted():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
