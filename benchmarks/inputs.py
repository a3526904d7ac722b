"""The inputs of a case: random unit embeddings, the same for every contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case

PAIR_COSINE = 0.5  # of positives; unrelated pairs are random, N(0, 1/D)
CLIP_SCALE = 1 / 0.07  # where CLIP starts
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0  # where SigLIP starts
TEMPERATURE = {"info_nce": 0.07, "moco": 0.07, "nt_xent": 0.1}

# The tensors of each loss in the order of its arguments; a star marks those with a gradient.
_ARGUMENTS = {
    "clip": "image_features* text_features* logit_scale*",
    "siglip": "image_features* text_features* logit_scale* logit_bias*",
    "info_nce": "query* positive_key*",
    "nt_xent": "z0* z1*",
    "moco": "query* positive_key negative_keys",
}


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: leaf tensors by name, in the order of the loss's arguments."""

    tensors: dict[str, Tensor]

    def arguments(self) -> Sequence[Tensor]:
        """Positional arguments of every contender's function."""
        return list(self.tensors.values())

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that need a gradient."""
        return {name: x for name, x in self.tensors.items() if x.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """What the last backward gave."""
        return {name: x.grad for name, x in self.leaves().items() if x.grad is not None}

    def clear_gradients(self) -> None:
        """Sets them to None, so that every backward allocates its own."""
        for x in self.tensors.values():
            x.grad = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as new leaves."""
        return Inputs(
            {
                name: x.detach().to(dtype).requires_grad_(x.requires_grad)
                for name, x in self.tensors.items()
            }
        )


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def make_inputs(case: Case, seed: int, device: torch.device) -> Inputs:
    """Random inputs: drawn in float32 on the CPU, then rounded to the case's dtype.

    Scales and biases are 0-dim, in float32 or wider, as models keep them.
    """
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case.d, generator=generator), dim=-1)

    first = unit(case.n)
    noise = unit(case.n)
    second = F.normalize(PAIR_COSINE * first + (1 - PAIR_COSINE**2) ** 0.5 * noise, dim=-1)
    numbers = [CLIP_SCALE] if case.loss == "clip" else [SIGLIP_SCALE, SIGLIP_BIAS]
    values: list[Any] = [first, second]
    values += [unit(case.m)] if case.loss == "moco" else numbers
    dtype = torch_dtype(case.dtype)
    tensors = {}
    for argument, value in zip(_ARGUMENTS[case.loss].split(), values, strict=False):
        if isinstance(value, Tensor):
            x = value.to(device=device, dtype=dtype)
        else:
            wide = torch.promote_types(dtype, torch.float32)
            x = torch.tensor(value, device=device, dtype=wide)
        tensors[argument.rstrip("*")] = x.requires_grad_(argument.endswith("*"))
    return Inputs(tensors)
