"""What losses across ranks send and multiply: ``python -m benchmarks.scaling``.

Counts forward and backward on 1 to 4 local gloo ranks, ours beside others' under the same count
(traffic.py has the convention), checks the bars, and (``model``) tells what follows for clusters.
Nothing here is a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.counting import DIM, LIBRARIES, ROWS, Row, tabulate
from benchmarks.reports import Report, header_of_ranks, load, save
from benchmarks.scaling_tables import bar_table, bars, peer_of, table
from benchmarks.schema import OK, SchemaError
from benchmarks.subjects import FASTCL

KIND = "scaling"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(min=2, help="The most ranks.")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="Of each rank.")] = ROWS,
    dim: Annotated[int, typer.Option(min=1, help="Of the embeddings.")] = DIM,
    out: Annotated[Path | None, typer.Option(help="Result file, or where it goes.")] = None,
) -> None:
    """Counts bytes and arithmetic of a rank, ours beside others'."""
    if context.invoked_subcommand is not None:
        return
    header, sizes = header_of_ranks(KIND), range(1, ranks + 1)
    counted = tabulate(LIBRARIES, sizes, rows, dim)
    _show(counted)
    if out is not None:
        typer.echo(f"results: {save(Report(KIND, header, counted), out)}")
    if any(row.status != OK for row in counted if row.library == FASTCL):
        raise typer.Exit(1)


def _show(rows: Sequence[Row]) -> None:
    most, sizes = max(row.ranks for row in rows), rows[0]
    typer.echo(f"One of {most} ranks, {sizes.rows} rows of {sizes.dim} numbers on each:\n")
    typer.echo(table(rows))
    name = peer_of("clip", rows)
    typer.echo(f"2 to {most} ranks, beside {name[0] if name else 'nothing'}:\n")
    typer.echo(bar_table(bars(rows)), nl=False)


@app.command("table")
def show(file: Annotated[Path, typer.Argument(help="A result file.")]) -> None:
    """Prints the tables of a result file."""
    try:
        _show(load(file, KIND, Row).rows)
    except (SchemaError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def model(
    loss: Annotated[str, typer.Option(help="clip or siglip.")] = "clip",
) -> None:
    """Prints what follows for clusters: a model, not measured."""
    from benchmarks import step_model

    if loss not in step_model.LOSSES:
        raise typer.BadParameter(f"{loss} is not one of {', '.join(step_model.LOSSES)}")
    typer.echo(step_model.table(loss), nl=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.scaling")
