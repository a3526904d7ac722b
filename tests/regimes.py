"""The draws on which the float64 rule is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.cases import Case, Tensors, streamed_backends


@dataclass(frozen=True)
class Regime:
    """A size, a scale, how embeddings lie, how many draws, and whether to take them apart."""

    name: str
    n: int
    d: int
    scale: float
    cone: bool
    draws: int = 8
    workspace: int | None = None
    apart: bool = False

    def __str__(self) -> str:
        return self.name

    def tensors(self, case: Case) -> list[Tensors]:
        """The case's inputs, one per draw."""
        return [
            case.tensors(seed, self.n, self.d, self.scale, self.cone) for seed in range(self.draws)
        ]

    @property
    def ways(self) -> list[dict[str, Any]]:
        """How to call the streamed functions: each backend, with the regime's workspace."""
        more = {} if self.workspace is None else {"workspace": self.workspace}
        return [{"backend": backend} | more for backend in streamed_backends()]


REGIMES = [
    Regime("training", 48, 16, scale=10.0, cone=True),
    Regime("hot", 65, 33, scale=100.0, cone=True),
    Regime("separated", 65, 33, scale=100.0, cone=False, apart=True),  # losses of 1e-3 and of 1e-20
    Regime("flat", 96, 24, scale=1.0, cone=False),
    Regime("many-tiles", 150, 20, scale=20.0, cone=True, draws=4, workspace=1 << 16),
]
