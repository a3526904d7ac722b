"""What ranks have agreed on: whose rows are where, and how the other tower comes to each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from fastcl.distributed.team import Team
from fastcl.kernels.dtypes import accumulation_dtype

MODES = ("auto", "gather", "ring")
Mode = Literal["auto", "gather", "ring"]
REDUCE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)

# "auto" sends blocks round a ring where the other tower with its gradient is larger than this, in
# bytes. With few rows on a rank much larger: products of small blocks do not hide transfers
# (docs/scaling.md).
GATHERED_LIMIT = 2 << 30
GATHERED_LIMIT_OF_FEW = 16 << 30
FEW_ROWS = 4096


def check_options(mode: str, reduce_dtype: torch.dtype | None) -> None:
    """Refuses a mode, or a dtype to send gradients in, that there is not."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")
    if reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(
            f"reduce_dtype={reduce_dtype} is not known; choose one of "
            + ", ".join(str(x) for x in REDUCE_DTYPES)
        )


def gathered_bytes(elements: int, dtype: torch.dtype, grad: bool) -> int:
    """What gather mode holds of the other tower: rows, their gradient, and that on its way."""
    return elements * (dtype.itemsize + (2 * accumulation_dtype(dtype).itemsize if grad else 0))


def choose_mode(mode: str, rows: int, dim: int, ranks: int, dtype: torch.dtype, grad: bool) -> str:
    """The mode for so many rows of all ranks: as given, and for "auto" by their size.

    Gathering sends less (a ring sends its blocks again in the backward), in fewer messages, and
    multiplies larger matrices; a ring holds two blocks.
    """
    if mode != "auto":
        return mode
    limit = GATHERED_LIMIT if rows >= FEW_ROWS * ranks else GATHERED_LIMIT_OF_FEW
    return "gather" if gathered_bytes(rows * dim, dtype, grad) <= limit else "ring"


@dataclass(frozen=True)
class Ranks:
    """The rows of the whole batch lie rank by rank: `counts[s]` of them on rank s."""

    team: Team
    counts: tuple[int, ...]
    mode: str
    reduce_dtype: torch.dtype | None

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.team.rank

    @property
    def size(self) -> int:
        """W, how many processes there are."""
        return self.team.size

    @functools.cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *accumulate(self.counts))

    @property
    def total(self) -> int:
        """N, the rows of the whole batch."""
        return self._starts[-1]

    @property
    def offset(self) -> int:
        """The first of this rank's rows in the whole batch."""
        return self._starts[self.rank]

    def rows_of(self, rank: int) -> slice:
        """Where the rows of a rank lie in the whole batch."""
        return slice(self._starts[rank], self._starts[rank + 1])

    def times(self, factor: int) -> Ranks:
        """The same with so many embeddings for each row (the views of a sample)."""
        return Ranks(
            self.team, tuple(factor * n for n in self.counts), self.mode, self.reduce_dtype
        )

    def share(self, local_sum: Tensor, reduction: str) -> Tensor:
        """This rank's loss of its rows' sum: the mean over ranks is the loss of the whole batch."""
        whole = local_sum * self.size
        return whole / self.total if reduction == "mean" else whole
