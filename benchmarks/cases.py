"""What is measured: the cases, their floors in FLOP, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal["forward+backward", "forward"]
BOTH: Phase = "forward+backward"
FORWARD: Phase = "forward"

# Floors in units of one product over the whole matrix of similarities, 2 * rows * cols * D FLOP
# ("What it costs" in docs/architecture.md): (forward and backward, forward alone).
_FLOORS: dict[str, tuple[float, float]] = {
    "clip": (4, 1),  # statistics; then the tile again and two gradients
    "info_nce": (3, 1),  # one direction: rows of tiles are kept until their gradient is made
    "siglip": (3, 1),  # one pass
    "nt_xent": (2, 0.5),  # 2N x 2N and symmetric: half of each of clip's four
    "moco": (2, 1),  # only the query needs a gradient: online rescaling
}
LOSSES = tuple(_FLOORS)
DTYPES = ("float32", "bfloat16", "float16", "float64")
QUEUE = 65_536  # negatives of a MoCo-like case, unless said


@dataclass(frozen=True)
class Case:
    """One problem: a loss, N x M embeddings of D numbers, a dtype.

    N counts pairs (nt_xent: of views, so that its matrix is 2N x 2N). M is N, except for "moco":
    `info_nce` of N queries against a queue of M negatives, where only the query needs a gradient.
    """

    loss: str
    n: int
    m: int
    d: int
    dtype: str

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is not known; choose from {', '.join(LOSSES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not known; choose from {', '.join(DTYPES)}")
        if min(self.n, self.m, self.d) < 1:
            raise ValueError(f"N, M and D must be positive, not {self.n}, {self.m}, {self.d}")
        if self.loss != "moco" and self.m != self.n:
            raise ValueError(f"{self.loss} is square: M is {self.m}, expected N = {self.n}")

    @property
    def name(self) -> str:
        """For tables and file names: loss-NxD-dtype, with M where it is not N."""
        shape = f"{self.n}x{self.d}" if self.loss != "moco" else f"{self.n}x{self.m}x{self.d}"
        return f"{self.loss}-{shape}-{self.dtype}"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix of similarities."""
        return (2 * self.n, 2 * self.n) if self.loss == "nt_xent" else (self.n, self.m)

    def floor_flops(self, phase: Phase = BOTH) -> int:
        """FLOP of the products that the loss cannot do without."""
        rows, cols = self.matrix
        products = _FLOORS[self.loss][0 if phase == BOTH else 1]
        return round(products * 2 * rows * cols * self.d)

    def shrunk(self, n: int) -> Case:
        """The same case with at most `n` pairs; a queue keeps its length."""
        n = min(self.n, n)
        return replace(self, n=n, m=self.m if self.loss == "moco" else n)


def make_case(loss: str, n: int, d: int, dtype: str, m: int | None = None) -> Case:
    """A case whose M follows from the loss: N, or the queue's length."""
    return Case(loss, n, (m or QUEUE) if loss == "moco" else n, d, dtype)


@dataclass(frozen=True)
class Preset:
    """Cases with what is measured of each by default."""

    cases: tuple[Case, ...]
    rounds: int
    compiled: bool
    memory: bool


_SQUARE = ("clip", "siglip", "info_nce")
_BY_N = tuple(make_case(x, n, 512, "float32") for x in _SQUARE for n in (1024, 2048, 4096, 16_384))
_BY_D = tuple(
    make_case(x, 8192, d, "float32") for x in _SQUARE for d in (64, 128, 256, 512, 768, 1024)
)
_GPU_D = (64, 128, 256, 512, 768, 1024, 1152)
PRESETS = {
    "quick": Preset(
        (
            *(make_case(x, 1024, 512, "float32") for x in (*_SQUARE, "nt_xent")),
            make_case("moco", 256, 128, "float32", 8192),
        ),
        rounds=5,
        compiled=False,
        memory=False,
    ),
    "default": Preset(
        tuple(
            make_case(loss, n, d, dtype)
            for loss, n, d in (
                *((x, 8192, 512) for x in _SQUARE),
                ("nt_xent", 4096, 512),
                ("moco", 256, 128),
            )
            for dtype in ("float32", "bfloat16")
        ),
        rounds=9,
        compiled=True,
        memory=True,
    ),
    "gpu": Preset(
        (
            *(make_case(x, 65_536, d, "bfloat16") for x in ("clip", "siglip") for d in _GPU_D),
            make_case("info_nce", 65_536, 768, "bfloat16"),
            make_case("nt_xent", 16_384, 768, "bfloat16"),
            make_case("moco", 256, 128, "bfloat16"),
        ),
        rounds=5,
        compiled=True,
        memory=True,
    ),
    "sweep": Preset(_BY_N + _BY_D, rounds=5, compiled=False, memory=False),
}
