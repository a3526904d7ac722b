"""What is tested: every public function with its tensors and options, as one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcl
from tests import eager

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Tensors = dict[str, Tensor]


def streamed_backends() -> list[str]:
    """Those of BACKENDS that this machine can run: without a compiler, "torch" alone."""
    return [name for name in BACKENDS if name in fastcl.available_backends("cpu")]


class Draw:
    """Random inputs of one size, in float64.

    `keys`: how many rows v has beside n of u, or a queue has; some more than n if it is None.
    `cone`: all rows lie in a cone so narrow that logits differ by a few units whatever the scale,
    as hard negatives do; otherwise they point anywhere.
    """

    def __init__(
        self, seed: int, n: int, d: int, scale: float, cone: bool, keys: int | None
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.d, self.scale, self.keys = n, d, scale, keys
        self.spread = (3 / scale) ** 0.5 if cone else None
        self.axis = self.directions(d)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers: a bias, or weights."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def directions(self, *shape: int) -> Tensor:
        """Unit rows that point anywhere."""
        return F.normalize(self.normal(*shape), dim=-1)

    def rows(self, *shape: int) -> Tensor:
        """Unit rows."""
        rows = self.directions(*shape, self.d)
        return rows if self.spread is None else F.normalize(self.axis + self.spread * rows, dim=-1)

    def towers(self) -> tuple[Tensor, Tensor]:
        """Paired unit rows that agree to some degree, as embeddings do in training."""
        u = self.rows(self.n)
        v = self.directions(self.n, self.d) * (self.spread or 1.0)
        return u, F.normalize(u + 0.7 * v, dim=-1)

    def number(self, value: float) -> Tensor:
        """A parameter with one element."""
        return torch.tensor(value, dtype=torch.float64)

    def ids(self, n: int) -> Tensor:
        """Ids of which a few are equal."""
        return torch.randint(0, max(1, 2 * n), (n,), generator=self.generator)


@dataclass(frozen=True)
class Case:
    """A public function with a maker of its tensors and its options."""

    name: str
    function: str
    make: Callable[[Draw], Tensors]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def ours(self) -> Callable[..., Any]:
        """fastcl's function."""
        return getattr(fastcl, self.function)

    @property
    def eager(self) -> Callable[..., Any]:
        """The same as people write it."""
        return getattr(eager, self.function)

    @property
    def truth(self) -> Callable[..., Any]:
        """The specification."""
        return getattr(fastcl.reference, self.function)

    def tensors(
        self,
        seed: int = 0,
        n: int = 12,
        d: int = 8,
        scale: float = 10.0,
        cone: bool = False,
        keys: int | None = None,
    ) -> Tensors:
        """One draw of the inputs, float64."""
        return self.make(Draw(seed, n, d, scale, cone, keys))

    def having(self, **options: Any) -> Case:
        """The case with other options."""
        return replace(self, options={**self.options, **options})


def _clip(draw: Draw) -> Tensors:
    u, v = draw.towers()
    return {"image_features": u, "text_features": v, "logit_scale": draw.number(draw.scale)}


def _siglip(draw: Draw) -> Tensors:
    return _clip(draw) | {"logit_bias": draw.number(-draw.scale)}


def _info_nce(draw: Draw) -> Tensors:
    u, v = draw.towers()
    return {"query": u, "positive_key": v, "temperature": draw.number(1 / draw.scale)}


def _queue(draw: Draw) -> Tensors:
    return _info_nce(draw) | {"negative_keys": draw.rows(draw.keys or 2 * draw.n + 3)}


def _mined(draw: Draw) -> Tensors:
    return _info_nce(draw) | {"negative_keys": draw.rows(draw.n, 7)}


def _nt_xent(draw: Draw) -> Tensors:
    u, v = draw.towers()
    return {"z0": u, "z1": v, "temperature": draw.number(1 / draw.scale)}


def _with_ids(make: Callable[[Draw], Tensors]) -> Callable[[Draw], Tensors]:
    return lambda draw: make(draw) | {"ids": draw.ids(draw.n)}


LOSSES = [
    Case("clip", "clip_loss", _clip),
    Case("clip-ids-none", "clip_loss", _with_ids(_clip), {"reduction": "none"}),
    Case("siglip", "siglip_loss", _siglip),
    Case("siglip-ids", "siglip_loss", _with_ids(_siglip)),
    Case("siglip-none", "siglip_loss", _siglip, {"reduction": "none"}),
    Case("info_nce", "info_nce", _info_nce),
    Case("info_nce-ids-sum", "info_nce", _with_ids(_info_nce), {"reduction": "sum"}),
    Case("info_nce-none", "info_nce", _info_nce, {"reduction": "none"}),
    Case("info_nce-symmetric", "info_nce", _info_nce, {"symmetric": True}),
    Case("info_nce-queue", "info_nce", _queue),
    Case("info_nce-queue-in_batch", "info_nce", _with_ids(_queue), {"in_batch": True}),
    Case("info_nce-paired", "info_nce", _mined, {"negative_mode": "paired"}),
    Case(
        "info_nce-paired-in_batch",
        "info_nce",
        _with_ids(_mined),
        {"negative_mode": "paired", "in_batch": True},
    ),
    Case("nt_xent", "nt_xent", _nt_xent),
    Case("nt_xent-ids-none", "nt_xent", _with_ids(_nt_xent), {"reduction": "none"}),
]


def _of_any_length(make: Callable[[Draw], Tensors]) -> Callable[[Draw], Tensors]:
    """Embeddings as an encoder leaves them, not normalised."""

    def make_longer(draw: Draw) -> Tensors:
        tensors = make(draw)
        return {
            name: x * (2 + draw.normal(*x.shape[:-1], 1).tanh()) if x.dim() > 1 else x
            for name, x in tensors.items()
        }

    return make_longer


NORMALIZED = [
    Case("clip-normalize", "clip_loss", _of_any_length(_clip), {"normalize": True}),
    Case("siglip-normalize", "siglip_loss", _of_any_length(_siglip), {"normalize": True}),
    Case("nt_xent-normalize", "nt_xent", _of_any_length(_nt_xent), {"normalize": True}),
    Case("info_nce-normalize", "info_nce", _of_any_length(_queue), {"normalize": True}),
    Case(
        "info_nce-paired-normalize",
        "info_nce",
        _of_any_length(_mined),
        {"negative_mode": "paired", "normalize": True},
    ),
]


def _rectangle(draw: Draw) -> Tensors:
    u, v = draw.towers()
    keys = draw.keys or draw.n + draw.n // 2 + 2
    v = torch.cat([v, draw.rows(max(0, keys - draw.n))])[:keys]
    return {"u": u, "v": v, "scale": draw.number(draw.scale)}


def _self(draw: Draw) -> Tensors:
    return {"u": draw.rows(draw.n), "scale": draw.number(draw.scale)}


def _also(make: Callable[[Draw], Tensors], *names: str) -> Callable[[Draw], Tensors]:
    """With more arguments: biases, weights, ids, or one scale for each row."""

    def make_more(draw: Draw) -> Tensors:
        tensors = make(draw)
        m = len(tensors.get("v", tensors["u"]))
        more = {
            "row_bias": lambda: {"row_bias": draw.normal(draw.n)},
            "col_bias": lambda: {"col_bias": draw.normal(m)},
            "diag_bias": lambda: {"diag_bias": draw.normal(draw.n)},
            "weights": lambda: {"weights": draw.normal(draw.n)},
            "bias": lambda: {"bias": draw.number(-draw.scale)},
            "ids": lambda: {"row_ids": draw.ids(draw.n), "col_ids": draw.ids(m)},
            "scales": lambda: {"scale": draw.scale * (1 + draw.normal(draw.n).tanh() / 2)},
        }
        for name in names:
            tensors |= more[name]()
        return tensors

    return make_more


_LSE = "similarity_logsumexp"
_WEIGHTED = "similarity_weighted_logsumexp"
_SIGMOID = "similarity_sigmoid"
_EVERY = ("scales", "row_bias", "col_bias", "ids")
PRIMITIVES = [
    Case("lse-rows", _LSE, _rectangle),
    Case("lse-cols", _LSE, _rectangle, {"dim": "cols"}),
    Case("lse-both", _LSE, _rectangle, {"dim": "both"}),
    Case("lse-self", _LSE, _self, {"mask_diagonal": 0}),
    Case("lse-self-both", _LSE, _self, {"dim": "both"}),
    Case("lse-self-biases", _LSE, _also(_self, "row_bias", "col_bias"), {"mask_diagonal": 0}),
    Case("lse-every", _LSE, _also(_rectangle, *_EVERY), {"dim": "both", "mask_diagonal": 2}),
    Case("lse-scales", _LSE, _also(_rectangle, "scales"), {"dim": "both"}),
    Case("lse-diag_bias", _LSE, _also(_rectangle, "diag_bias", "ids"), {"dim": "both"}),
    Case("lse-self-diag_bias", _LSE, _also(_self, "diag_bias")),
    Case("weighted", _WEIGHTED, _also(_rectangle, "weights")),
    Case("weighted-positives", _WEIGHTED, _also(_rectangle, "ids"), {"positives": 2}),
    Case(
        "weighted-positives-every",
        _WEIGHTED,
        _also(_rectangle, "weights", "scales", "col_bias", "ids"),
        {"positives": 0},
    ),
    Case(
        "weighted-zero-every", _WEIGHTED, _also(_rectangle, "weights", *_EVERY), {"add_zero": True}
    ),
    Case("sigmoid", _SIGMOID, _also(_rectangle, "bias")),
    Case("sigmoid-rows", _SIGMOID, _also(_rectangle, "bias"), {"reduction": "rows"}),
    Case("sigmoid-negatives", _SIGMOID, _also(_rectangle, "bias"), {"positives": None}),
    Case("sigmoid-every", _SIGMOID, _also(_rectangle, "bias", *_EVERY), {"positives": 1}),
    Case(
        "sigmoid-every-rows",
        _SIGMOID,
        _also(_rectangle, "bias", *_EVERY),
        {"positives": 1, "reduction": "rows"},
    ),
]
ALL = [*LOSSES, *PRIMITIVES]
