"""What fastcl.explain says is what happens."""

from __future__ import annotations

import doctest
import importlib
from typing import Any
from unittest import mock

import pytest
import torch

import fastcl
from fastcl.kernels import dispatch
from tests.cases import streamed_backends


def _counted(loss: str, backend: str, n: int, workspace: int | None) -> tuple[float, int]:
    """(products over the whole matrix, tiles made in one pass), counted while the loss runs."""
    u, v = (torch.randn(n, 8).requires_grad_() for _ in range(2))
    area, gradients = 0, set()
    table: Any = dispatch.get(backend)
    original = table.products

    def counting(stream: Any) -> Any:
        products = original(stream)
        similarity, both = products.similarity, products.gradients

        def made(a: Any, b: Any, out: torch.Tensor) -> None:
            nonlocal area
            area += out.numel()
            similarity(a, b, out)

        def multiplied(g: torch.Tensor, a: Any, b: Any, da: Any, db: Any) -> None:
            nonlocal area
            area += g.numel() * ((da is not None) + (db is not None))
            gradients.add((len(gradients), g.shape))
            both(g, a, b, da, db)

        products.similarity, products.gradients = made, multiplied
        return products

    arguments = {"clip_loss": (3.0,), "siglip_loss": (3.0, -1.0)}.get(loss, ())
    with mock.patch.object(table, "products", counting):
        getattr(fastcl, loss)(u, v, *arguments, backend=backend, workspace=workspace).backward()
    rows = 2 * n if loss == "nt_xent" else n
    return area / rows**2, len(gradients)


@pytest.mark.parametrize("workspace", [None, 1 << 16])
@pytest.mark.parametrize("backend", streamed_backends())
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "siglip_loss", "nt_xent"])
def test_products_and_tiles_are_those_that_are_made(
    loss: str, backend: str, workspace: int | None
) -> None:
    told = fastcl.explain(loss, 300, 8, backend=backend, workspace=workspace)
    products, tiles = _counted(loss, backend, 300, workspace)
    assert told.products == pytest.approx(products, abs=1e-3)
    assert told.tiles == tiles
    assert told.workspace <= (workspace or 256 << 20)


def test_a_plan_for_a_gpu_needs_none() -> None:
    told = fastcl.explain("siglip_loss", 65536, 768, dtype=torch.bfloat16, backend="triton")
    assert (told.products, told.tiles, told.launches) == (3.0, 48, 48 * 3)
    assert told.flops == pytest.approx(6 * 65536**2 * 768)
    assert told.workspace + told.accumulators < 0.7e9
    text = str(told)
    assert "48 of up to 5632 x 16384" in text
    assert "3 x 2NMD = 19.8 TFLOP" in text


def test_a_rank_of_several() -> None:
    """By hand: what one of 8 ranks does for CLIP, gathered and in a ring."""
    n, d, ranks = 4096, 512, 8
    gather = fastcl.explain("clip_loss", n, d, world_size=ranks)
    assert (gather.n, gather.m, gather.world_size, gather.mode) == (n, ranks * n, ranks, "gather")
    assert gather.products == 4.0
    assert gather.flops == 4 * 2 * n * (ranks * n) * d
    one_way, lines = 4 * (ranks - 1) * n * d, 8 * (ranks - 1) * n
    assert gather.sent == 2 * one_way + 2 * lines + 24 * (ranks - 1)
    assert gather.held == 4 * ranks * n * d
    ring = fastcl.explain("clip_loss", n, d, world_size=ranks, mode="ring")
    assert ring.sent == gather.sent + one_way
    assert ring.held == 4 * 2 * n * d
    assert ring.flops == gather.flops
    assert "8, mode ring: of one of them" in str(ring)
    half = fastcl.explain("clip_loss", n, d, world_size=ranks, reduce_dtype=torch.bfloat16)
    assert gather.sent - half.sent == one_way // 2


@pytest.mark.parametrize(
    ("loss", "gather", "ring"),
    [("clip_loss", 4, 4), ("siglip_loss", 3, 4), ("info_nce", 3, 4), ("nt_xent", 2, 2)],
)
def test_products_of_a_rank(loss: Any, gather: float, ring: float) -> None:
    for mode, products in (("gather", gather), ("ring", ring)):
        told = fastcl.explain(loss, 1000, 64, backend="torch", world_size=4, mode=mode)
        assert told.products == pytest.approx(products, rel=0.1)  # NT-Xent's diagonal tiles


def test_modes_of_a_rank() -> None:
    told = fastcl.explain("siglip_loss", 1 << 17, 1024, dtype=torch.bfloat16, world_size=64)
    assert told.mode == "ring"
    assert fastcl.explain("siglip_loss", 64, 64).mode is None
    for loss in ("siglip_loss", "info_nce"):  # of one process, whatever the mode: 3 products
        assert fastcl.explain(loss, 64, 64, mode="ring") == fastcl.explain(loss, 64, 64)
    with pytest.raises(ValueError, match="m has no meaning for a batch across ranks"):
        fastcl.explain("info_nce", 8, 8, m=9, world_size=2)
    with pytest.raises(ValueError, match="world_size is 0; expected a positive number of ranks"):
        fastcl.explain("info_nce", 8, 8, world_size=0)
    with pytest.raises(ValueError, match="mode='circle' is not known"):
        fastcl.explain("info_nce", 8, 8, world_size=2, mode="circle")


def test_traffic_of_one_tile_and_of_many() -> None:
    """By hand: float32 on a CPU, S written and read twice over, G written once and read twice."""
    n, d = 100, 8
    one = fastcl.explain("clip_loss", n, d, backend="torch")
    assert one.tiles == 1
    tiles = (2 + 2 + 1 + 2) * n * n
    operands, accumulators = (2 + 1) * 2 * n * d, 2 * n * d  # written once, never read
    assert one.traffic == 4 * (tiles + operands + accumulators)
    large = fastcl.explain("clip_loss", 65536, 768, dtype=torch.bfloat16, backend="triton")
    n, d, g = 65536, 768, 3 * 2 * 65536**2
    lines = (4 + 12) * n  # 12 x 4 chunks: each row is met 4 times, each column 12 times
    assert large.traffic == g + 2 * d * 3 * lines + 4 * d * (2 * lines - 2 * n)
    owned = fastcl.explain("clip_loss", 65536, 128, dtype=torch.bfloat16, backend="triton")
    assert owned.traffic < g / 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("clip", 8, 8), ValueError, "loss='clip' is not known; choose one of info_nce"),
        (("clip_loss", 0, 8), ValueError, "n is 0; expected a positive number"),
        (("clip_loss", 8, 2.5), ValueError, "d is 2.5; expected a positive number"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastcl.explain(*arguments)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="m has no meaning for clip_loss"):
        fastcl.explain("clip_loss", 8, 8, m=4)
    with pytest.raises(ValueError, match="no plan to explain"):
        fastcl.explain("clip_loss", 8, 8, backend="reference")
    with pytest.raises(TypeError, match=r"dtype torch\.int32; expected one of"):
        fastcl.explain("clip_loss", 8, 8, dtype=torch.int32)


def test_doctests() -> None:
    module = importlib.import_module("fastcl.similarity.explain")
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried >= 4
    assert failed == 0
