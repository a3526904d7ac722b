"""The losses and primitives with their gradients in extended precision, written out by hand.

What all errors are measured against. numpy's longdouble has 11 bits more than float64 on x86, and
losses are written as log(1 + ...), so that none is too small: the reference, being cross-entropy as
PyTorch has it, keeps 16 digits of the logits but none of a loss of 1e-20. Each function takes the
arguments of fastcl's, as numpy arrays, and returns its outputs and its gradients for the cotangents
of `tests.rule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# Else (MSVC, macOS on ARM) float64 itself cannot be measured, and tests.rule skips it.
AVAILABLE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
Array = np.ndarray[Any, Any]
Result = tuple[list[Array], dict[str, Array]]


def cotangent(shape: tuple[int, ...]) -> Array:
    """As tests.rule.cotangent."""
    if not shape:
        return np.full((), 0.5, np.longdouble)
    return (np.arange(np.prod(shape)) * 5 % 16 + 1).reshape(shape).astype(np.longdouble) / 8


class Matrix:
    """Logits scale_i <u_i, v_j> + biases, and the way back from their gradient."""

    def __init__(self, u, v, scale, row_bias=None, col_bias=None, diag_bias=None):
        self.u, self.v = u, v
        self.scale = np.broadcast_to(scale, len(u))
        self.similarities = u @ v.T
        self.logits = self.scale[:, None] * self.similarities
        if row_bias is not None:
            self.logits = self.logits + row_bias[:, None]
        if col_bias is not None:
            self.logits = self.logits + col_bias
        if diag_bias is not None:
            self.logits = self.logits + diagonal(self.logits.shape) * diag_bias[:, None]

    def gradients(self, g: Array) -> dict[str, Array]:
        """Of u, v, the scale of each row, and the biases, given that of the logits."""
        weighted = g * self.scale[:, None]
        return {
            "u": weighted @ self.v,
            "v": weighted.T @ self.u,
            "scale": (g * self.similarities).sum(1),
            "row_bias": g.sum(1),
            "col_bias": g.sum(0),
            "diag_bias": np.diagonal(g),
        }


def diagonal(shape, offset=0):
    """True at the pairs (i, i + offset)."""
    return np.arange(shape[1])[None, :] == np.arange(shape[0])[:, None] + offset


def equal(row_ids, col_ids):
    """True at the pairs with equal ids."""
    return False if row_ids is None else row_ids[:, None] == col_ids[None, :]


def softmax(x: Array, axis: int) -> tuple[Array, Array]:
    """Logsumexp along an axis, and its gradient; -inf and 0 where nothing is left."""
    top = x.max(axis, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = e.sum(axis, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.squeeze(top + np.log(total), axis)
    return lse, e / np.where(total == 0, 1, total)


def softplus(x: Array) -> tuple[Array, Array]:
    """log(1 + e^x), and its derivative."""
    e = np.exp(-abs(x))
    return np.maximum(x, 0) + np.log1p(e), np.where(x > 0, 1, e) / (1 + e)


def contrast(x: Array, positive: Array, axis: int = 1) -> tuple[Array, Array]:
    """-log softmax at the positive of each line, and its gradient; exact however small."""
    lse, p = softmax(np.where(positive, -np.inf, x), axis)
    values, share = softplus(lse - np.where(positive, x, 0).sum(axis))
    return values, np.expand_dims(share, axis) * (p - positive)


def reduced(values: Array, reduction: str) -> tuple[Array, Array]:
    """The reduced loss, and the gradient of each value."""
    if reduction == "none":
        return values, cotangent(values.shape)
    count = len(values) if reduction == "mean" else 1
    return values.sum() / count, np.full_like(values, cotangent(())) / count


def normalizing(loss: Callable[..., Result]) -> Callable[..., Result]:
    """The loss with an option `normalize`: of rows over their norms, and the way back from it."""

    @functools.wraps(loss)
    def wrapped(*embeddings: Array, normalize: bool = False, **given: Any) -> Result:
        if not normalize:
            return loss(*embeddings, **given)
        norms = {
            name: np.sqrt((x * x).sum(-1, keepdims=True))
            for name, x in given.items()
            if isinstance(x, np.ndarray) and x.ndim > 1
        }
        units = {name: given[name] / norm for name, norm in norms.items()}
        outputs, back = loss(**{**given, **units})
        for name, norm in norms.items():
            y, g = units[name], back[name]
            back[name] = (g - y * (y * g).sum(-1, keepdims=True)) / norm
        return outputs, back

    return wrapped


def _of_temperature(scale_gradient, temperature):
    return -scale_gradient.sum() / temperature**2


@normalizing
def clip_loss(image_features, text_features, logit_scale, *, ids=None, reduction="mean") -> Result:
    """Cross-entropy over rows and columns."""
    m = Matrix(image_features, text_features, logit_scale)
    positive = diagonal(m.logits.shape)
    x = np.where(equal(ids, ids) & ~positive, -np.inf, m.logits)
    (rows, g_rows), (cols, g_cols) = contrast(x, positive), contrast(x, positive, axis=0)
    loss, c = reduced((rows + cols) / 2, reduction)
    back = m.gradients((c[:, None] * g_rows + c * g_cols) / 2)
    names = {"image_features": "u", "text_features": "v"}
    gradients = {name: back[key] for name, key in names.items()}
    return [loss], gradients | {"logit_scale": back["scale"].sum()}


@normalizing
def siglip_loss(
    image_features, text_features, logit_scale, logit_bias, *, ids=None, reduction="mean"
) -> Result:
    """-log sigmoid of all pairs."""
    m = Matrix(image_features, text_features, logit_scale)
    positive = diagonal(m.logits.shape)
    sign = np.where(positive, -1, 1)
    values, slopes = softplus(sign * (m.logits + logit_bias))
    kept = ~(equal(ids, ids) & ~positive)
    loss, c = reduced((values * kept).sum(1), reduction)
    g = c[:, None] * slopes * sign * kept
    back = m.gradients(g)
    return [loss], {
        "image_features": back["u"],
        "text_features": back["v"],
        "logit_scale": back["scale"].sum(),
        "logit_bias": g.sum(),
    }


@normalizing
def info_nce(
    query,
    positive_key,
    negative_keys=None,
    *,
    temperature,
    negative_mode="unpaired",
    in_batch=None,
    symmetric=False,
    ids=None,
    reduction="mean",
) -> Result:
    """Cross-entropy of the positive against each query's negatives."""
    if symmetric:
        loss, g = clip_loss(query, positive_key, 1 / temperature, ids=ids, reduction=reduction)
        return loss, {
            "query": g["image_features"],
            "positive_key": g["text_features"],
            "temperature": _of_temperature(g["logit_scale"], temperature),
        }
    batch = Matrix(query, positive_key, 1 / temperature)
    positive = diagonal(batch.logits.shape)
    use_batch = negative_keys is None or in_batch
    x = np.where(positive, batch.logits, -np.inf)
    if use_batch:
        x = np.where(equal(ids, ids) & ~positive, -np.inf, batch.logits)
    n = len(query)
    if negative_keys is None:
        negatives = np.zeros((n, 0), np.longdouble)
    elif negative_mode == "unpaired":
        negatives = query @ negative_keys.T
    else:
        negatives = np.einsum("nd,nmd->nm", query, negative_keys)
    x = np.concatenate([x, negatives / temperature], axis=1)
    values, g = contrast(x, diagonal(x.shape))
    loss, c = reduced(values, reduction)
    g_batch, g_negatives = c[:, None] * g[:, :n], c[:, None] * g[:, n:]
    back = batch.gradients(g_batch)
    scale_gradient = back["scale"] + (g_negatives * negatives).sum(1)
    gradients = {
        "query": back["u"],
        "positive_key": back["v"],
        "temperature": _of_temperature(scale_gradient, temperature),
    }
    if negative_keys is not None:
        g_negatives = g_negatives / temperature
        paired = negative_mode == "paired"
        gradients["query"] = gradients["query"] + (
            np.einsum("nm,nmd->nd", g_negatives, negative_keys)
            if paired
            else g_negatives @ negative_keys
        )
        gradients["negative_keys"] = (
            g_negatives[:, :, None] * query[:, None] if paired else g_negatives.T @ query
        )
    return [loss], gradients


@normalizing
def nt_xent(z0, z1, *, temperature, ids=None, reduction="mean") -> Result:
    """Cross-entropy over all views but each anchor's own."""
    n, z = len(z0), np.concatenate([z0, z1])
    m = Matrix(z, z, 1 / temperature)
    shape = m.logits.shape
    partner = diagonal(shape, n) | diagonal(shape, -n)
    both = None if ids is None else np.concatenate([ids, ids])
    x = np.where(diagonal(shape) | (equal(both, both) & ~partner), -np.inf, m.logits)
    values, g = contrast(x, partner)
    loss, c = reduced(values, reduction)
    back = m.gradients(c[:, None] * g)
    dz = back["u"] + back["v"]
    dt = _of_temperature(back["scale"], temperature)
    return [loss], {"z0": dz[:n], "z1": dz[n:], "temperature": dt}


def similarity_logsumexp(
    u,
    v=None,
    *,
    scale,
    row_bias=None,
    col_bias=None,
    diag_bias=None,
    mask_diagonal=None,
    row_ids=None,
    col_ids=None,
    dim="rows",
) -> Result:
    """Logsumexps of rows and columns."""
    m = Matrix(u, u if v is None else v, scale, row_bias, col_bias, diag_bias)
    dropped = np.zeros(m.logits.shape, bool) | equal(row_ids, col_ids)
    if mask_diagonal is not None:
        dropped |= diagonal(m.logits.shape, mask_diagonal)
    x = np.where(dropped, -np.inf, m.logits)
    (rows, p_rows), (cols, p_cols) = softmax(x, 1), softmax(x, 0)
    g = np.zeros_like(x)
    if dim != "cols":
        g = g + cotangent(rows.shape)[:, None] * p_rows
    if dim != "rows":
        g = g + cotangent(cols.shape) * p_cols
    back = m.gradients(g)
    if v is None:
        back["u"] = back["u"] + back["v"]
    outputs = {"rows": [rows], "cols": [cols], "both": [rows, cols]}[dim]
    return outputs, _scale_as_given(back, scale)


def similarity_weighted_logsumexp(
    u,
    v,
    weights=None,
    *,
    scale,
    row_bias=None,
    col_bias=None,
    row_ids=None,
    col_ids=None,
    positives=None,
    add_zero=False,
) -> Result:
    """sum_i w_i log(sum_j e^l_ij), relative to the positive's or a zero where asked."""
    m = Matrix(u, v, scale, row_bias, col_bias)
    at = np.zeros(m.logits.shape, bool)
    if positives is not None:
        at = diagonal(m.logits.shape, positives)
    x = np.where(equal(row_ids, col_ids) & ~at, -np.inf, m.logits)
    if positives is not None:
        values, g = contrast(x, at)
    elif add_zero:
        x = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)
        values, g = contrast(x, np.broadcast_to(np.arange(x.shape[1]) == len(v), x.shape))
    else:
        values, g = softmax(x, 1)
    w = np.ones_like(values) if weights is None else weights
    c = cotangent(())
    back = m.gradients(c * w[:, None] * g[:, : len(v)])
    return [(w * values).sum()], _scale_as_given(back, scale) | {"weights": c * values}


def similarity_sigmoid(
    u,
    v,
    *,
    scale,
    bias,
    row_bias=None,
    col_bias=None,
    positives=0,
    row_ids=None,
    col_ids=None,
    reduction="sum",
) -> Result:
    """softplus(l) of the negatives and softplus(-l) of the positives."""
    m = Matrix(u, v, scale, row_bias, col_bias)
    at = np.zeros(m.logits.shape, bool)
    if positives is not None:
        at = diagonal(m.logits.shape, positives)
    sign = np.where(at, -1, 1)
    values, slopes = softplus(sign * (m.logits + bias))
    kept = ~(equal(row_ids, col_ids) & ~at)
    loss, c = reduced((values * kept).sum(1), "none" if reduction == "rows" else "sum")
    g = c[:, None] * slopes * sign * kept
    back = m.gradients(g)
    return [loss], _scale_as_given(back, scale) | {"bias": g.sum()}


def _scale_as_given(back: dict[str, Array], scale: Array) -> dict[str, Array]:
    """Summed where one number served all rows."""
    return back if np.ndim(scale) else back | {"scale": back["scale"].sum()}
