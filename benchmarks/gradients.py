"""Gradients across ranks under DDP against one process: ``python -m benchmarks.gradients``.

Two encoders, a learnt log-scale and (sigmoid) a bias train one step under DistributedDataParallel,
on local gloo ranks in float64. The truth is the library's own loss for one process, on the whole
batch. Reported is what DDP's mean leaves in the parameters: 1.00 and a cosine of 1.000 mean that a
learning rate, and a run, carry over from one process to many.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import peers
from benchmarks.ranks import RankError, on_ranks, said
from benchmarks.reports import Report, header_of_ranks, load, markdown, save
from benchmarks.schema import OK
from benchmarks.subjects import FASTCL, RESTATED, SUBJECTS, TEMPERATURE, Subject

KIND = "gradients"
INPUT, DIM = 12, 8
EVEN = {2: (8, 8), 3: (8, 8, 8)}
UNEVEN = {2: (5, 11), 3: (3, 8, 13)}
TOLERANCE = 0.005  # 1.00 to two places

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Row:
    """Gradients of one loss after DDP's mean, over those of one process. None: there is none.

    `features`: ratio of norms of all encoder parameters' gradients, `cosine` their direction;
    `loss`: the mean of the ranks' losses; `scale`, `bias`: with sign.
    """

    library: str
    version: str | None
    loss_name: str
    setting: str
    batch: list[int]  # rows of each rank
    status: str  # "ok", or why there are no figures
    features: float | None = None
    cosine: float | None = None
    scale: float | None = None
    bias: float | None = None
    loss: float | None = None

    @property
    def exact(self) -> bool:
        """Whether everything that is there is 1.00, and the cosine 1.000."""
        ratios = [x for x in (self.features, self.scale, self.bias, self.loss) if x is not None]
        near = all(abs(x - 1) < TOLERANCE for x in ratios)
        return self.cosine is not None and near and self.cosine > 1 - TOLERANCE / 10


class _Towers(nn.Module):
    """Two encoders, and what the loss learns beside them."""

    def __init__(self, learns: Sequence[str]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(INPUT, DIM) for _ in range(2))
        learnt = {"scale": torch.tensor(-math.log(TEMPERATURE)), "bias": torch.tensor(-2.0)}
        for name, value in learnt.items():
            # DDP wants no parameter that the loss does not use.
            setattr(self, name, nn.Parameter(value) if name in learns else value)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rows = (F.normalize(f(x), dim=1) for f, x in zip(self.encoders, inputs, strict=True))
        return (*rows, torch.as_tensor(self.scale).exp(), torch.as_tensor(self.bias))

    def gradients(self) -> dict[str, Tensor]:
        """Of all encoder parameters in one vector, and of what is learnt beside them."""
        found = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        features = torch.cat([found.pop(n).flatten() for n in sorted(found) if "encoders" in n])
        return {"features": features, **found}


def measure(rank: int, chosen: Sequence[int], batches: Sequence[Sequence[int]]) -> list[Row]:
    """Rows of those subjects on those batches, on one rank of several."""
    rows = []
    for batch in batches:
        for subject in (SUBJECTS[i] for i in chosen):
            try:
                figures, status = _compare(subject, rank, batch), OK
            except Exception as error:
                figures, status = {}, said(error)
            rows.append(_row(subject, batch, status, figures))
    return rows


def _compare(subject: Subject, rank: int, batch: Sequence[int]) -> dict[str, float]:
    """The step under DDP, and the same in one process."""
    torch.manual_seed(0)
    towers = _Towers(subject.learns).double()
    inputs = torch.randn(2, sum(batch), INPUT, dtype=torch.float64)
    twin = copy.deepcopy(towers)
    across, alone = subject.build(rank, len(batch))
    own = slice(sum(batch[:rank]), sum(batch[: rank + 1]))

    parallel = DistributedDataParallel(towers)  # must live until the backward is over
    loss = across(*parallel(*inputs[:, own]))
    loss.backward()  # type: ignore[no-untyped-call]
    mean = loss.detach().double()
    dist.all_reduce(mean)
    truth = alone(*twin(*inputs))
    truth.backward()  # type: ignore[no-untyped-call]

    got, true = towers.gradients(), twin.gradients()
    features, expected = got.pop("features"), true.pop("features")
    return {
        "features": float(features.norm() / expected.norm()),
        "cosine": float(F.cosine_similarity(features, expected, dim=0)),
        "loss": float(mean / len(batch) / truth.detach()),
        **{name: float(got[name] / true[name]) for name in got},
    }


def _row(
    subject: Subject, batch: Sequence[int], status: str, figures: dict[str, float] | None = None
) -> Row:
    version = peers.version(subject.library)
    row = Row(subject.library, version, subject.loss, subject.setting, list(batch), status)
    return Row(**(asdict(row) | (figures or {})))


def tabulate(libraries: Sequence[str], sizes: Sequence[int], timeout: float = 120) -> list[Row]:
    """Rows of all subjects of those libraries: each library in processes of its own."""
    rows = []
    for library in libraries:
        chosen = [i for i, subject in enumerate(SUBJECTS) if subject.library == library]
        for size in sizes:
            batches = [EVEN[size], UNEVEN[size]] if library == FASTCL else [EVEN[size]]
            try:
                rows += on_ranks(size, measure, chosen, batches, timeout=timeout)[0]
            except RankError as error:
                rows += [_row(SUBJECTS[i], x, said(error)) for x in batches for i in chosen]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown; figures of one loss on several numbers of ranks stand side by side."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = (row.library, row.loss_name, f"({row.setting})" if row.setting else "")
        uneven = ", uneven batches" if len(set(row.batch)) > 1 else ""
        together.setdefault((*name, uneven), []).append(row)
    sizes = " / ".join(str(size) for size in sorted({len(row.batch) for row in rows}))
    head = (f"on {sizes} ranks", "features", "cosine", "scale", "bias", "loss")
    lines = [
        [" ".join(filter(None, name)) + uneven, *_cells(found)]
        for (*name, uneven), found in together.items()
    ]
    return markdown(head, lines)


def _cells(rows: Sequence[Row]) -> list[str]:
    """Each figure on each number of ranks."""
    if failed := [row for row in rows if row.status != OK]:
        return [failed[0].status.replace("|", "/"), *[""] * 4]
    columns: list[tuple[Callable[[Row], float | None], int]] = [
        (lambda row: row.features, 2),
        (lambda row: row.cosine, 3),
        (lambda row: row.scale, 2),
        (lambda row: row.bias, 2),
        (lambda row: row.loss, 2),
    ]
    return [
        " / ".join(filter(None, (_figure(of(row), digits) for row in rows)))
        for of, digits in columns
    ]


def _figure(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


@app.command()
def run(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "2,3",
    library: Annotated[
        str | None, typer.Option(help=f"Some of {FASTCL},{','.join(peers.LIBRARIES)}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result file, or where it goes.")] = None,
    show: Annotated[Path | None, typer.Option(help="Only print this result file.")] = None,
) -> None:
    """Tells the scale and direction of every loss's gradient across ranks."""
    console = Console()
    if show is not None:
        typer.echo(table(load(show, KIND, Row).rows), nl=False)
        return
    names = library.split(",") if library else [FASTCL, *peers.LIBRARIES, RESTATED]
    header = header_of_ranks(KIND)
    with Console(stderr=True).status("ranks are computing"):
        rows = tabulate(names, [int(x) for x in ranks.split(",")])
    text = table(rows)
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text, nl=False)
    if out is not None:
        typer.echo(f"results: {save(Report(KIND, header, rows), out)}")
    if not all(row.exact for row in rows if row.library == FASTCL):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.gradients")
