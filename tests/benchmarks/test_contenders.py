"""Every contender computes the same loss, and its own time and memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import LOSSES, make_case
from benchmarks.contenders import EAGER_FORM, EAGER_VARIANT, FASTCL, loss_function
from benchmarks.eager import EAGER, EAGER_VARIANTS
from benchmarks.errors import Judge
from benchmarks.inputs import make_inputs
from benchmarks.memory import MemoryFailure, extra_bytes
from benchmarks.ours import fastcl_loss, truth
from benchmarks.timing import Contender, CpuClock, alternate, paired_ratio, warm_up

CPU = torch.device("cpu")
FORMS = [(loss, form) for table in (EAGER, EAGER_VARIANTS) for loss, form in table.items()]


@pytest.mark.parametrize(("loss", "form"), FORMS, ids=lambda x: getattr(x, "__name__", x))
def test_eager_equals_fastcl_in_float64(loss: str, form) -> None:  # type: ignore[no-untyped-def]
    case = make_case(loss, 37, 24, "float64", m=53)
    values, gradients = [], []
    for function in (form, fastcl_loss(loss), truth(loss)):
        inputs = make_inputs(case, 3, CPU)
        value = function(*inputs.arguments())
        value.backward()
        values.append(value.detach())
        gradients.append(inputs.gradients())
        assert set(inputs.gradients()) == set(inputs.leaves())
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_are_the_same_each_time_and_never_zeros(loss: str) -> None:
    case = make_case(loss, 16, 8, "bfloat16", m=20)
    first, second, other = (make_inputs(case, seed, CPU).tensors for seed in (0, 0, 1))
    for name, x in first.items():
        assert torch.equal(x, second[name])
        assert x.dim() == 0 or not torch.equal(x, other[name])
        assert (x != 0).float().mean() > 0.9


@pytest.mark.parametrize("loss", LOSSES)
def test_errors_are_those_of_the_dtype(loss: str) -> None:
    judge = Judge(make_case(loss, 64, 16, "float32", m=100), CPU)
    errors = judge.errors(fastcl_loss(loss))
    assert errors.loss is not None
    assert errors.loss < 1e-5
    assert all(e is not None and 0 < e < 1e-4 for e in errors.gradients.values())
    wrong = judge.errors(lambda *tensors: 1.01 * fastcl_loss(loss)(*tensors))
    assert wrong.loss == pytest.approx(0.01, rel=1e-2)


def test_contenders_alternate_on_the_same_set_and_failures_stay_out() -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda index: calls.append((name, index)))

    def broken(index: int) -> None:
        raise RuntimeError("no such thing")

    contenders = [contender("a"), Contender("broken", broken), contender("b")]
    warm_up(contenders, 2, str)
    assert contenders[1].failure == "no such thing"
    calls.clear()
    seconds = alternate(contenders, sets=2, rounds=8, clock=CpuClock())
    rounds = [calls[i : i + 2] for i in range(0, 16, 2)]
    assert [{index for _, index in turn} for turn in rounds] == [{0}, {1}] * 4
    assert all({name for name, _ in turn} == {"a", "b"} for turn in rounds)
    assert len({turn[0][0] for turn in rounds}) == 2, "now one is first, now the other"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 8, "b": 8}


def test_ratios_are_of_rounds() -> None:
    assert paired_ratio([1.0, 20.0, 3.0], [2.0, 10.0, 6.0]) == 0.5


def test_a_variant_is_absent_where_there_is_none() -> None:
    assert loss_function(EAGER_VARIANT, make_case("siglip", 8, 4, "float32"), "auto") is None


@pytest.mark.slow
def test_memory_counts_the_matrix_and_not_inputs_or_gradients() -> None:
    case = make_case("clip", 2048, 16, "float32")
    eager = extra_bytes(case, EAGER_FORM, "auto", CPU, 1)
    ours = extra_bytes(case, FASTCL, "auto", CPU, 1)
    matrix = 4 * 2048 * 2048
    assert 3 * matrix < eager < 9 * matrix
    assert ours < 1.5 * matrix  # a tile is half a matrix at this size
    with pytest.raises(MemoryFailure, match="nonsense"):
        extra_bytes(case, FASTCL, "nonsense", CPU, 1)
