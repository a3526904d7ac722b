"""The float64 rule on the device, at small sizes for every case and at real ones for the losses.

At real sizes the truth is the streamed losses on float64 inputs, which go through PyTorch's own
operations tile by tile; tests on the CPU hold those against exact formulas.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcl
from fastcl.kernels.dtypes import accumulation_dtype
from tests import eager
from tests.cases import ALL, LOSSES, NORMALIZED, Case
from tests.rule import cast, cotangent

HALF = (torch.bfloat16, torch.float16)


def _on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.cuda() for k, x in tensors.items()}


def _run(function: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients, in float64."""
    leaves = {
        k: x.detach().clone().requires_grad_() if x.is_floating_point() else x
        for k, x in tensors.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [cotangent(x) for x in outputs])
    found = {f"output {i}": x.detach().double() for i, x in enumerate(outputs)}
    gradients = {k: x.grad for k, x in leaves.items() if x.is_floating_point()}
    return found | {f"gradient of {k}": g.double() for k, g in gradients.items() if g is not None}


def _check(
    ours: Any, theirs: Any, truth: Any, draws: list[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """The rule of tests.rule, with everything on the device."""
    worst: dict[str, list[float]] = {}
    for tensors in draws:
        wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
        right, mine, eagers = truth(wide), ours(tensors), theirs(tensors)
        for name, value in right.items():
            largest = float(value.abs().max())
            errors = [float((found[name] - value).abs().max()) for found in (mine, eagers)]
            kept = worst.setdefault(name, [0.0, 0.0, 0.0])
            for k, x in enumerate((*errors, largest)):
                kept[k] = x if x != x else max(kept[k], x)
    broken = {}
    for name, (mine_error, eager_error, largest) in worst.items():
        returned = torch.float32 if name.startswith("output") else dtype
        ulp = torch.finfo(returned).eps * largest
        if dtype in HALF:
            allowed = max(eager_error, ulp / 2 + 4 * torch.finfo(torch.float32).eps * largest)
        else:
            allowed = 2 * eager_error + 4 * ulp
        if not mine_error <= allowed:
            broken[name] = f"error {mine_error:.3g} > {allowed:.3g}, eager's {eager_error:.3g}"
    assert not broken, broken


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", [*ALL, *NORMALIZED], ids=str)
def test_every_case(case: Case) -> None:
    _small(case, 64, torch.bfloat16)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    _small(case, 64, dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("d", [1, 7, 100, 512, 768, 1152, 4096])
@pytest.mark.parametrize("case", [c for c in LOSSES if c.name in ("clip", "siglip")], ids=str)
def test_dimensions(case: Case, d: int) -> None:
    _small(case, d, torch.bfloat16)


def _small(case: Case, d: int, dtype: torch.dtype) -> None:
    draws = [
        _on_device(cast(case.tensors(seed, 130, d, scale=20.0, cone=True), dtype))
        for seed in range(4)
    ]
    _check(
        lambda t: _run(case.ours, t, **case.options, backend="triton"),
        lambda t: _run(case.eager, t, **case.options),
        lambda t: _run(case.truth, t, **case.options),
        draws,
        dtype,
    )


def _towers(n: int, d: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    u, noise = (torch.randn(n, d, generator=generator, device="cuda") for _ in range(2))
    u = F.normalize(u, dim=1)
    return u.to(dtype), F.normalize(u + 1.5 * F.normalize(noise, dim=1), dim=1).to(dtype)


def _loss(name: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    u, v = tensors["u"], tensors["v"]
    number: dict[str, Any] = {"device": "cuda", "dtype": accumulation_dtype(u.dtype)}
    scale = torch.tensor(30.0, **number)
    return {
        "clip_loss": ("clip_loss", {"image_features": u, "text_features": v, "logit_scale": scale}),
        "siglip_loss": (
            "siglip_loss",
            {
                "image_features": u,
                "text_features": v,
                "logit_scale": scale,
                "logit_bias": torch.tensor(-10.0, **number),
            },
        ),
        "info_nce": ("info_nce", {"query": u, "positive_key": v, "temperature": 1 / scale}),
        "nt_xent": ("nt_xent", {"z0": u, "z1": v, "temperature": 1 / scale}),
    }[name]


@pytest.mark.parametrize(
    ("dtype", "d"), [(torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 256)], ids=str
)
@pytest.mark.parametrize("n", [1000, 4096, 16384, 65536])
@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss", "info_nce", "nt_xent"])
def test_real_sizes(name: str, n: int, dtype: torch.dtype, d: int) -> None:
    if n == 65536 and (dtype == torch.float32 or name == "nt_xent"):
        pytest.skip("eager's matrices would take most of any device's memory")
    u, v = _towers(n, d, dtype, seed=n)

    def run(module: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        function, arguments = _loss(name, tensors)
        return _run(getattr(module, function), arguments, **options)

    _check(
        lambda t: run(fastcl, t, backend="triton"),
        lambda t: run(eager, t),
        lambda t: run(fastcl, t, backend="torch"),
        [{"u": u, "v": v}],
        dtype,
    )
