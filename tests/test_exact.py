"""What the float64 rule takes for the truth agrees with the specification, fastcl.reference."""

from __future__ import annotations

import pytest
import torch

from tests import exact
from tests.cases import ALL, NORMALIZED, Case
from tests.rule import cast, check_rule, evaluate, truth


@pytest.mark.parametrize("cone", [True, False])
@pytest.mark.parametrize("case", [*ALL, *NORMALIZED], ids=str)
def test_exact_formulas_are_the_references(case: Case, cone: bool) -> None:
    for seed in range(3):
        tensors = cast(case.tensors(seed, n=13, d=5, scale=6.0, cone=cone), torch.float64)
        right = truth(case, tensors)
        made = evaluate(case.truth, tensors, case.options)
        assert made.keys() <= right.keys()  # the formulas have gradients of all that could be given
        for name, value in made.items():
            expected = torch.as_tensor(right[name].astype("f8"))
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12, msg=name)


def test_float64_is_skipped_where_nothing_is_more_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "AVAILABLE", False)
    case, draws = ALL[0], [ALL[0].tensors(0, n=5, d=3)]
    with pytest.raises(pytest.skip.Exception, match="no wider than float64"):
        check_rule(case, torch.float64, draws, {})
    check_rule(case, torch.float32, draws, {})
