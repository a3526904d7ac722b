"""Mistakes that must be caught: each is made on purpose, and the float64 rule must refuse it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.kernels.dispatch import Gradients
from fastcl.kernels.streamed import _Rows
from fastcl.kernels.tiles import Running, Side, Sums, Tile, TorchTiles
from fastcl.kernels.walk import Accumulator, TileMaker, TorchProducts, add_product
from fastcl.similarity.ops import sums
from tests.cases import ALL
from tests.rule import cast, measure, truth, violations

# Every walk has several tiles; float32 and the portable tiles, which Python can change.
DRAW = {"n": 150, "d": 12, "scale": 10.0, "cone": True}
WAY = {"backend": "torch", "workspace": 1 << 16}
CASES = {case.name: case for case in ALL}
Patch = pytest.MonkeyPatch


def _tripled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same three times: a loss whose incoming gradient is not 1."""

    def call(**arguments: Any) -> Any:
        out = function(**arguments)
        return tuple(3 * x for x in out) if isinstance(out, tuple) else 3 * out

    return call


@cache
def _prepared(name: str) -> tuple[Any, ...]:
    """What no mutation changes: the case, its draws, the truth and eager's errors."""
    case = CASES[name]
    draws = [cast(case.tensors(seed, **DRAW), torch.float32) for seed in (0, 1)]
    truths = [{k: 3 * x for k, x in truth(case, tensors).items()} for tensors in draws]
    return case, draws, truths, measure(_tripled(case.eager), case, draws, truths)


def _broken(name: str) -> dict[str, str]:
    """The tensors of a case for which the rule is broken."""
    case, draws, truths, eager = _prepared(name)
    ours = _tripled(partial(case.ours, **WAY))
    return violations(measure(ours, case, draws, truths), eager, torch.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _shifted_label(patch: Patch) -> None:
    made = TileMaker.tile

    def tile(self: TileMaker, *args: Any, **options: Any) -> Tile:
        right = made(self, *args, **options)
        return right if right.diagonal is None else replace(right, diagonal=right.diagonal + 1)

    patch.setattr(TileMaker, "tile", tile)


def _shifted_partner(patch: Patch) -> None:
    add = Accumulator._add_pairs

    def shifted(
        self: Accumulator, target: Tensor, grad: Tensor, partners: Tensor, *at: Any
    ) -> None:
        add(self, target, grad, partners.roll(-1, 0), *at)

    patch.setattr(Accumulator, "_add_pairs", shifted)


def _no_scale_in_tiles(patch: Patch) -> None:
    finish = TorchTiles._finish

    def without(tile: Tile, g: Tensor, sums: Sums) -> None:
        finish(tile, g, sums)
        tile.s.copy_(g)

    patch.setattr(TorchTiles, "_finish", staticmethod(without))


def _no_scale_in_pairs(patch: Patch) -> None:
    add = Accumulator._add_pairs

    def without(self: Accumulator, *args: Any) -> None:
        unscaled = copy.copy(self)
        unscaled.stream = replace(self.stream, scale=torch.ones_like(self.stream.scale))
        add(unscaled, *args)

    patch.setattr(Accumulator, "_add_pairs", without)


def _no_pairs_in_the_scale(patch: Patch) -> None:
    finish = Accumulator.finish
    patch.setattr(Accumulator, "finish", lambda self, pairs=None, s=None: finish(self, pairs))


def _no_column_gradient(patch: Patch) -> None:
    gradient = TorchTiles.softmax_gradient

    def without(self: TorchTiles, tile: Tile, rows: Any, cols: Side | None, sums: Sums) -> None:
        gradient(self, tile, rows, None, sums)

    patch.setattr(TorchTiles, "softmax_gradient", without)


def _no_column_statistics_past_the_first_tile(patch: Patch) -> None:
    statistics, seen = TorchTiles.softmax_statistics, set()

    def without(self: TorchTiles, tile: Tile, rows: Any, cols: Running | None) -> None:
        again = cols is not None and cols.max.data_ptr() in seen
        seen.add(0 if cols is None else cols.max.data_ptr())
        statistics(self, tile, rows, None if again else cols)

    patch.setattr(TorchTiles, "softmax_statistics", without)


def _described(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    described = TileMaker.described
    patch.setattr(TileMaker, "described", lambda *args: change(described(*args)))


def _no_column_bias(patch: Patch) -> None:
    _described(patch, lambda x: x | {"cols": replace(x["cols"], bias=None)})


def _no_positive_gradient(patch: Patch) -> None:
    patch.setattr(Accumulator, "_add_pairs", lambda *args: None)


def _no_positive_gradient_for_u(patch: Patch) -> None:
    add = Accumulator._add_pairs

    def not_to_u(self: Accumulator, target: Tensor, *args: Any) -> None:
        if self.du is None or target.data_ptr() != self.du.data_ptr():
            add(self, target, *args)

    patch.setattr(Accumulator, "_add_pairs", not_to_u)


def _bias_gradient(change: Callable[[Gradients], Gradients]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        finish = Accumulator.finish
        patch.setattr(Accumulator, "finish", lambda *args: change(finish(*args)))

    return apply


def _negated(x: Tensor | None) -> Tensor | None:
    return None if x is None else -x


def _no_ids(patch: Patch) -> None:
    _described(patch, lambda x: x | {"rows": replace(x["rows"], ids=None)})


def _no_mirrored_tiles(patch: Patch) -> None:
    def gradients(self: Any, g: Tensor, a: Tensor, b: Tensor, da: Any, db: Any) -> None:
        add_product(da, g, b)

    patch.setattr(TorchProducts, "gradients", gradients)


def _no_weight_of_the_zero(patch: Patch) -> None:
    finish = _Rows.finish

    def without(self: _Rows, rows: slice) -> Side:
        finish(self, rows)
        self.grad_logits[rows] = self.weights[rows]
        return self.running[rows].side(self.weights[rows])

    patch.setattr(_Rows, "finish", without)


def _incoming_gradient_ignored(patch: Patch) -> None:
    scaled = sums.scaled
    patch.setattr(sums, "scaled", lambda grad, *rest: scaled(torch.ones_like(grad), *rest))


@dataclass(frozen=True)
class Mutation:
    """A mistake, and the cases in which the rule must see it."""

    name: str
    apply: Callable[[Patch], None]
    caught_by: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


_TOWERS = ("clip", "siglip", "siglip-none", "info_nce", "info_nce-none", "nt_xent")
MUTATIONS = [
    Mutation("label shifted by one", _shifted_label, (*_TOWERS, "weighted-positives")),
    Mutation("partner shifted by one", _shifted_partner, (*_TOWERS, "weighted-positives")),
    Mutation("no scale in G", _no_scale_in_tiles, (*_TOWERS, "lse-both", "weighted", "sigmoid")),
    Mutation("no scale in the positives' gradient", _no_scale_in_pairs, _TOWERS),
    Mutation("no positives in the scale's gradient", _no_pairs_in_the_scale, _TOWERS),
    Mutation(
        "no column term in the gradient", _no_column_gradient, ("clip", "nt_xent", "lse-cols")
    ),
    Mutation(
        "columns see their first tile only",
        _no_column_statistics_past_the_first_tile,
        ("clip", "nt_xent", "lse-cols", "lse-both"),
    ),
    Mutation("no column bias", _no_column_bias, ("lse-every", "weighted-zero-every")),
    Mutation("no gradient of the positives", _no_positive_gradient, _TOWERS),
    Mutation("no gradient of the positives for u", _no_positive_gradient_for_u, _TOWERS[:-1]),
    Mutation(
        "bias gradient of the wrong sign",
        _bias_gradient(lambda g: g._replace(row_bias=_negated(g.row_bias))),
        ("siglip", "siglip-none", "sigmoid", "lse-every", "info_nce-queue"),
    ),
    Mutation(
        "column bias gradient of the wrong sign",
        _bias_gradient(lambda g: g._replace(col_bias=_negated(g.col_bias))),
        ("lse-every", "sigmoid-every", "weighted-positives-every"),
    ),
    Mutation("ids ignored", _no_ids, ("clip-ids-none", "siglip-ids", "info_nce-ids-sum")),
    Mutation("no gradient of mirrored tiles", _no_mirrored_tiles, ("nt_xent", "lse-self")),
    Mutation(
        "weight of log(1 + sum) forgotten", _no_weight_of_the_zero, ("info_nce", "info_nce-queue")
    ),
    Mutation(
        "incoming gradient ignored", _incoming_gradient_ignored, ("info_nce-ids-sum", "siglip")
    ),
]
EVERY = sorted({name for mutation in MUTATIONS for name in mutation.caught_by})


@pytest.mark.parametrize("name", EVERY)
def test_without_a_mistake_the_rule_holds(name: str) -> None:
    assert not _broken(name)


@pytest.mark.parametrize(
    ("mutation", "name"),
    [pytest.param(m, name, id=f"{m}-{name}") for m in MUTATIONS for name in m.caught_by],
)
def test_a_mistake_is_caught(mutation: Mutation, name: str, monkeypatch: Patch) -> None:
    _prepared(name)
    mutation.apply(monkeypatch)
    assert _broken(name)
