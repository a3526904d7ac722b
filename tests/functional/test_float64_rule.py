"""Every loss in every dtype, by the float64 rule."""

from __future__ import annotations

import pytest
import torch

from tests.cases import DTYPES, LOSSES, NORMALIZED, Case
from tests.regimes import REGIMES, Regime
from tests.rule import check_rule


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*LOSSES, *NORMALIZED], ids=str)
def test_loss_and_gradients(case: Case, dtype: torch.dtype, regime: Regime) -> None:
    check_rule(case, dtype, regime.tensors(case), *regime.ways, apart=regime.apart)
