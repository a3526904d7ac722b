"""Random calls for hypothesis: a case with its options, and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import Case, Tensors

Call = tuple[Case, Tensors]
sizes = st.integers(1, 24) | st.sampled_from([31, 32, 33, 64, 65])
dims = st.integers(1, 9) | st.sampled_from([16, 17])
scales = st.sampled_from([0.0, 0.3, 1.0, 10.0, 100.0, -3.0])


def _normal(draw: st.DrawFn, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _rows(draw: st.DrawFn, *shape: int) -> Tensor:
    """Unit rows, of which some may be equal."""
    rows = torch.nn.functional.normalize(_normal(draw, *shape), dim=-1)
    copies = draw(st.lists(st.integers(0, shape[0] - 1), max_size=3))
    rows[copies] = rows[0].clone()
    return rows


def _ids(draw: st.DrawFn, n: int) -> Tensor:
    """From all equal to all different."""
    of = st.integers(0, draw(st.integers(0, 40)))
    return torch.tensor(draw(st.lists(of, min_size=n, max_size=n)))


def _call(function: str, tensors: Tensors, **options: Any) -> Call:
    return Case(function, function, lambda draw: {}, options), tensors


def _some(draw: st.DrawFn, makers: dict[str, Callable[[], Tensor]]) -> Tensors:
    """Any of these arguments."""
    wanted = draw(st.sets(st.sampled_from(sorted(makers))))
    return {name: makers[name]() for name in sorted(wanted)}


def _stream(draw: st.DrawFn, n: int, m: int) -> Tensors:
    """A scale, or one for each row; biases; ids."""
    one = draw(st.booleans())
    scale = torch.tensor(draw(scales), dtype=torch.float64)
    tensors = {"scale": scale if one else scale * (1.5 + _normal(draw, n).tanh())}
    makers = {"row_bias": lambda: _normal(draw, n), "col_bias": lambda: _normal(draw, m)}
    tensors |= _some(draw, makers)
    if draw(st.booleans()):
        tensors |= {"row_ids": _ids(draw, n), "col_ids": _ids(draw, m)}
    return tensors


@st.composite
def logsumexp_calls(draw: st.DrawFn) -> Call:
    """similarity_logsumexp with any of its options."""
    n, d, alone = draw(sizes), draw(dims), draw(st.booleans())
    m = n if alone else draw(sizes)
    tensors = {"u": _rows(draw, n, d)} | ({} if alone else {"v": _rows(draw, m, d)})
    tensors |= _stream(draw, n, m)
    options: dict[str, Any] = {"dim": draw(st.sampled_from(["rows", "cols", "both"]))}
    diagonal = draw(st.sampled_from(["mask", "bias", "none"]))
    if diagonal == "mask":
        options["mask_diagonal"] = draw(st.integers(0, m - 1))
    elif diagonal == "bias":
        tensors["diag_bias"] = _normal(draw, min(n, m))
    return _call("similarity_logsumexp", tensors, **options)


@st.composite
def weighted_calls(draw: st.DrawFn) -> Call:
    """similarity_weighted_logsumexp: with positives, with a zero, or with rows never empty."""
    kind = draw(st.sampled_from(["positives", "zero", "plain"]))
    n, d, start = draw(sizes), draw(dims), draw(st.integers(0, 3))
    m = n + start + draw(st.integers(0, 20))
    tensors = {"u": _rows(draw, n, d), "v": _rows(draw, m, d)} | _stream(draw, n, m)
    tensors |= _some(draw, {"weights": lambda: _normal(draw, n)})
    options: dict[str, Any] = {"add_zero": kind == "zero"}
    if kind == "positives":
        tensors.pop("row_bias", None)
        options = {"positives": start}
    elif kind == "plain":
        tensors = {k: x for k, x in tensors.items() if not k.endswith("ids")}
    return _call("similarity_weighted_logsumexp", tensors, **options)


@st.composite
def sigmoid_calls(draw: st.DrawFn) -> Call:
    """similarity_sigmoid with any of its options."""
    n, m, d = draw(sizes), draw(sizes), draw(dims)
    tensors = {"u": _rows(draw, n, d), "v": _rows(draw, m, d)} | _stream(draw, n, m)
    tensors["bias"] = torch.tensor(draw(st.sampled_from([0.0, -10.0, 2.0])), dtype=torch.float64)
    positives = draw(st.none() | st.integers(0, m - 1))
    reduction = draw(st.sampled_from(["sum", "rows"]))
    return _call("similarity_sigmoid", tensors, positives=positives, reduction=reduction)


@st.composite
def loss_calls(draw: st.DrawFn) -> Call:
    """Any loss in any mode."""
    n, d = draw(sizes), draw(dims)
    u, v = _rows(draw, n, d), _rows(draw, n, d)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    ids: Tensors = {"ids": _ids(draw, n)} if draw(st.booleans()) else {}
    scale = torch.tensor(draw(st.sampled_from([0.3, 1.0, 10.0, 100.0])), dtype=torch.float64)
    function = draw(st.sampled_from(["clip_loss", "siglip_loss", "nt_xent", "info_nce"]))
    if function in ("clip_loss", "siglip_loss"):
        tensors = {"image_features": u, "text_features": v, "logit_scale": scale}
        bias = {"logit_bias": -scale} if function == "siglip_loss" else {}
        return _call(function, tensors | bias | ids, **options)
    if function == "nt_xent":
        return _call(function, {"z0": u, "z1": v, "temperature": 1 / scale} | ids, **options)
    tensors = {"query": u, "positive_key": v, "temperature": 1 / scale}
    mode = draw(st.sampled_from(["batch", "symmetric", "unpaired", "paired"]))
    if mode == "symmetric":
        options["symmetric"] = True
    elif mode != "batch":
        count = draw(sizes)
        shape = (count, d) if mode == "unpaired" else (n, count, d)
        tensors["negative_keys"] = _rows(draw, *shape)
        options |= {"negative_mode": mode, "in_batch": draw(st.booleans())}
        ids = ids if options["in_batch"] else {}
    return _call(function, tensors | ids, **options)
