"""Under torch.compile: whole graphs, one compilation for all batch sizes, the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastcl
from tests.cases import ALL, Case
from tests.rule import cast, evaluate, measure, truth, violations

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SIZES = (12, 20, 33, 57)


def _compiled(case: Case) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(**tensors: Tensor) -> Any:
        return case.ours(**tensors, **case.options)

    return torch.compile(loss, backend=counter, fullgraph=True, dynamic=True), counter


def _compilations(counter: CompileCounterWithBackend) -> int:
    """Graphs that hold something: PyTorch also counts an empty one, of a frame of its own."""
    return sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_one_graph_for_every_size(case: Case) -> None:
    """With whatever backend is best here: a graph holds opaque operators, so it is the same."""
    function, counter = _compiled(case)
    for n in SIZES:
        tensors = case.tensors(n=n, d=8)
        plain = evaluate(case.ours, tensors, case.options)
        for name, x in evaluate(function, tensors, {}).items():
            assert torch.equal(x, plain[name]), f"{name} differs at n = {n}"
    assert _compilations(counter) == 1


@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent"])
def test_sizes_become_dynamic_by_themselves(name: str) -> None:
    """Without `dynamic=True`: once more at the second size, and never again."""
    (case,) = (c for c in ALL if str(c) == name)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(case.ours, backend=counter, fullgraph=True)
    for n in SIZES:
        evaluate(function, case.tensors(n=n, d=8), case.options)
    assert _compilations(counter) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_a_model(dtype: torch.dtype) -> None:
    """The loss of a compiled training step, with the encoder in the same graph."""
    encoder = torch.nn.Linear(6, 4, dtype=dtype)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        features = (torch.nn.functional.normalize(encoder(z), dim=-1) for z in (x, y))
        return fastcl.clip_loss(*features, scale.exp())

    x, y = torch.randn(2, 16, 6).to(dtype)
    scale = torch.tensor(2.0, requires_grad=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        encoder.zero_grad()
        scale.grad = None
        function(x, y, scale).backward()
        results.append([encoder.weight.grad.clone(), scale.grad.clone()])
    for plain, given in zip(*results, strict=True):
        assert torch.equal(plain, given)


def test_use_backend_inside_and_around() -> None:
    """A context within compiled code, and a compiled function within a context."""
    u, v = torch.randn(5, 3), torch.randn(5, 3)

    def inside(u: Tensor, v: Tensor) -> Tensor:
        with fastcl.use_backend("torch"):
            return fastcl.clip_loss(u, v, 5.0)

    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    expected = fastcl.clip_loss(u, v, 5.0, backend="torch")
    assert torch.equal(torch.compile(inside, backend=keep, fullgraph=True)(u, v), expected)
    assert "'torch'" in graphs[-1]

    around = torch.compile(lambda u, v: fastcl.clip_loss(u, v, 5.0), backend=keep, fullgraph=True)
    for name in ("torch", "reference"):
        with fastcl.use_backend(name):
            expected = fastcl.clip_loss(u, v, 5.0)
            assert torch.equal(around(u, v), expected)
        operators = "fastcl" in graphs[-1]
        assert operators == (name != "reference"), f"the context {name!r} was not seen"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent"])
def test_inductor(name: str) -> None:
    """It fuses the vector expressions, so that not the bits but the rule must hold."""
    (case,) = (c for c in ALL if str(c) == name)
    function = torch.compile(case.ours, fullgraph=True, dynamic=True)
    draws = [cast(case.tensors(seed, n=12 + seed, d=8), torch.float32) for seed in range(8)]
    truths = [truth(case, tensors) for tensors in draws]
    ours, eager = (measure(f, case, draws, truths) for f in (function, case.eager))
    assert not violations(ours, eager, torch.float32)
