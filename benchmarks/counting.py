"""Counts of every loss across local gloo ranks, ours and others', as rows of a result file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.ranks import RankError, on_ranks, said
from benchmarks.schema import OK
from benchmarks.subjects import (
    FASTCL,
    OURS,
    RESTATED,
    Subject,
    lightly,
    open_clip,
    open_clip_restated,
    open_clip_sigmoid,
    ours,
)
from benchmarks.traffic import Work, count

MODES = ("gather", "ring")
DTYPES = (torch.float32, torch.bfloat16)
ROWS, DIM = 320, 768  # no product is over 768 numbers but those that make similarities


@dataclass(frozen=True)
class Row:
    """What one rank of several does in one loss and its backward. None: it failed.

    `family`: fastcl's name of the loss. `embeddings`, `gradients`: in which dtype each is sent.
    `alike`: the ranks of which all this is true.
    """

    library: str
    version: str | None
    family: str
    setting: str
    embeddings: str
    gradients: str
    ranks: int
    alike: list[int]
    rows: int
    dim: int
    status: str
    sent: dict[str, int] | None = None  # bytes, by collective
    flops: int | None = None
    tiles: int | None = None
    similarities: int | None = None

    @property
    def bytes_sent(self) -> int:
        """By all collectives."""
        return sum((self.sent or {}).values())


def subjects(library: str) -> list[tuple[Subject, torch.dtype | None]]:
    """What is counted of a library, and in which dtype ours sends gradients (None: float32)."""
    if library == FASTCL:
        return [
            # Compiled products in bfloat16 are not PyTorch's, which alone are seen.
            (ours(loss, mode, mode=mode, reduce_dtype=wire, backend="torch"), wire)
            for loss in OURS
            for mode in MODES
            for wire in (None, torch.bfloat16)
        ]
    others = {
        RESTATED: [open_clip_restated()],
        "open_clip": [open_clip(True, True), open_clip_sigmoid("bidir")],
        "lightly": [lightly()],
    }
    return [(subject, None) for subject in others[library]]


LIBRARIES = (FASTCL, RESTATED, "open_clip", "lightly")


class Place(NamedTuple):
    """A rank, and what it holds."""

    ranks: int
    rank: int
    rows: int
    dim: int


def measure(rank: int, library: str, size: int, rows: int, dim: int) -> list[Row]:
    """Rows of all subjects of a library, on one rank."""
    place, made = Place(size, rank, rows, dim), []
    for subject, wire in subjects(library):
        for dtype in DTYPES:
            row = _row(subject, wire, dtype, place, OK)
            try:
                made.append(Row(**(asdict(row) | asdict(_counted(subject, place, dtype)))))
            except Exception as error:
                made.append(replace(row, status=said(error)))
    return made


def _counted(subject: Subject, place: Place, dtype: torch.dtype) -> Work:
    torch.manual_seed(place.rank)
    image, text = F.normalize(torch.randn(2, place.rows, place.dim), dim=2).to(dtype)
    image.requires_grad_()
    text.requires_grad_()
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    across, _ = subject.build(place.rank, place.ranks)

    def step() -> None:
        loss: Tensor = across(image, text, scale, bias)
        loss.backward()  # type: ignore[no-untyped-call]

    return count(step, place.dim)


def _row(
    subject: Subject, wire: torch.dtype | None, dtype: torch.dtype, place: Place, status: str
) -> Row:
    gradients = (wire or torch.float32) if subject.library == FASTCL else dtype
    embeddings, sums = (str(x).removeprefix("torch.") for x in (dtype, gradients))
    library, version = subject.library, peers.version(subject.library)
    size, rank, rows, dim = place
    words = library, version, subject.family, subject.setting
    return Row(*words, embeddings, sums, size, [rank], rows, dim, status)


def tabulate(
    libraries: Iterable[str], sizes: Iterable[int], rows: int, dim: int, timeout: float = 120
) -> list[Row]:
    """Rows of all ranks, alike ones in one: each library in processes of its own."""
    made: list[Row] = []
    for library in libraries:
        for size in sizes:
            try:
                found = on_ranks(size, measure, library, size, rows, dim, timeout=timeout)
                made += merged([row for of_rank in found for row in of_rank])
            except RankError as error:
                place, why = Place(size, 0, rows, dim), said(error)
                of = subjects(library)
                made += [_row(s, wire, dtype, place, why) for s, wire in of for dtype in DTYPES]
    return made


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in nothing but the rank, in one."""
    found: list[Row] = []
    for row in rows:
        twin = next((x for x in found if replace(x, alike=[]) == replace(row, alike=[])), None)
        if twin is None:
            found.append(row)
        else:
            twin.alike.extend(row.alike)
    return found
