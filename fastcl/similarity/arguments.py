"""The arguments that every stream takes, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.kernels import dispatch
from fastcl.kernels.dispatch import Stream
from fastcl.similarity.inputs import (
    check_diagonal,
    check_embeddings,
    check_ids,
    check_scale,
    check_transforms,
    check_vector,
    check_workspace,
)


class Arguments(NamedTuple):
    """A stream's arguments in the operators' order, checked and in their final dtypes."""

    u: Tensor
    v: Tensor | None
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    diagonal: int | None
    backend: str
    workspace: int

    @property
    def keys(self) -> Tensor:
        """v, or u where they are the same."""
        return self.u if self.v is None else self.v

    @property
    def logits(self) -> dict[str, Any]:
        """What makes logits of similarities, and drops pairs by id, as every reference names it."""
        return {
            "scale": self.scale,
            "row_bias": self.row_bias,
            "col_bias": self.col_bias,
            "row_ids": self.row_ids,
            "col_ids": self.col_ids,
        }

    @property
    def stream(self) -> Stream:
        """The same without the backend, as backends take it."""
        row_bias, col_bias = self.row_bias, self.col_bias
        return Stream(
            self.u,
            self.v,
            self.scale.contiguous(),
            None if row_bias is None else row_bias.contiguous(),
            None if col_bias is None else col_bias.contiguous(),
            self.row_ids,
            self.col_ids,
            self.diagonal,
            self.workspace,
        )

    @property
    def needs(self) -> list[bool]:
        """Which of u, v, scale, row_bias, col_bias want a gradient now."""
        on = torch.is_grad_enabled()
        return [on and x is not None and x.requires_grad for x in self[:5]]


def check_stream(
    u: Tensor,
    v: Tensor | None,
    scale: float | Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str,
    workspace: int | None,
    *,
    mirrored: bool = False,
    may_be_empty: bool = False,
    **named: int | None,
) -> Arguments:
    """A stream's arguments, checked; its diagonal by the name that the user knows it by."""
    ((diagonal_name, diagonal),) = named.items()
    own_ids = col_ids is not None and col_ids is not row_ids
    if v is None:
        (u,) = check_embeddings(may_be_empty, u=u)
        col_ids = row_ids if col_ids is None else col_ids
    else:
        u, v = check_embeddings(may_be_empty, u=u, v=v)
    n, m = u.shape[0], (u if v is None else v).shape[0]
    if (row_ids is None) != (col_ids is None):
        given, missing = ("row_ids", "col_ids") if col_ids is None else ("col_ids", "row_ids")
        raise ValueError(f"{given} is given without {missing}: ids of both sides are compared")
    if not may_be_empty:
        diagonal = check_diagonal(diagonal_name, diagonal, m)
    scale = check_scale("scale", scale, u)
    row_bias = check_vector("row_bias", row_bias, n, u)
    col_bias = check_vector("col_bias", col_bias, m, u)
    name = dispatch.resolve(backend, u.device)
    default = 0 if name == dispatch.REFERENCE else dispatch.get(name).default_workspace
    if name != dispatch.REFERENCE:
        check_transforms(u, v, scale, row_bias, col_bias)
    lopsided = scale.dim() or row_bias is not None or col_bias is not None or own_ids
    if v is None and (lopsided or (diagonal and not mirrored)):
        v = u  # the matrix of logits is not symmetric: all of it is needed
    return Arguments(
        u,
        v,
        scale,
        row_bias,
        col_bias,
        check_ids("row_ids", row_ids, n, u),
        check_ids("col_ids", col_ids, m, u),
        diagonal,
        name,
        check_workspace(workspace, default),
    )
