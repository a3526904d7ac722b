"""The command line: ``python -m benchmarks``, ``... table FILE``, ``... plot FILE``."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.cases import LOSSES, PRESETS, Case, make_case
from benchmarks.contenders import COMPILED, FASTCL, all_names
from benchmarks.device import OtherLoad, default_path, make_header
from benchmarks.ours import backend_name
from benchmarks.runner import Options, run_cases
from benchmarks.schema import OK, Results, SchemaError, load, save
from benchmarks.tables import markdown, rich_tables

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _chosen(text: str | None, allowed: tuple[str, ...], option: str) -> tuple[str, ...]:
    """The comma-separated names, all known; everything for None."""
    if text is None:
        return allowed
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in allowed]:
        raise typer.BadParameter(
            f"{', '.join(unknown)} is not known; choose from {', '.join(allowed)}",
            param_hint=option,
        )
    return names


def _cases(
    preset: str, losses: list[str], dtypes: list[str], ns: list[int], m: int | None, ds: list[int]
) -> list[Case]:
    """The preset's cases, with what was asked for in place of what it has."""
    cases = [c for c in PRESETS[preset].cases if c.loss in (losses or LOSSES)]
    # With dtypes, N or D given, one case of each of the preset's shapes is made anew.
    changed: dict[Case, None] = {}
    for case in cases:
        for dtype in dtypes or [case.dtype]:
            for n in ns or [case.n]:
                for d in ds or [case.d]:
                    queue = (m or case.m) if case.loss == "moco" else None
                    changed[make_case(case.loss, n, d, dtype, queue)] = None
    return list(changed)


def _device(name: str) -> torch.device:
    """A device that is there."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise typer.BadParameter(
            f"{name} is not known; expected cpu or cuda", param_hint="--device"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"PyTorch {torch.__version__} sees no {name} here", param_hint="--device"
        )
    return torch.device(name)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}.")] = "default",
    loss: Annotated[
        str | None, typer.Option(help=f"Some of {','.join(LOSSES)}.  [default: the preset's]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32,bfloat16,...  [default: the preset's]")
    ] = None,
    n: Annotated[list[int] | None, typer.Option(help="Pairs; may be repeated.")] = None,
    m: Annotated[int | None, typer.Option(help="Length of moco's queue.")] = None,
    d: Annotated[list[int] | None, typer.Option(help="Dimension; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each.")] = None,
    backend: Annotated[str, typer.Option(help="fastcl's: auto, cpu, torch, ...")] = "auto",
    contenders: Annotated[
        str | None, typer.Option(help=f"Some of {','.join(all_names())}.  [default: all]")
    ] = None,
    forward: Annotated[bool, typer.Option("--forward", help="Time it alone, too.")] = False,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Run torch.compile.")
    ] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="Measure peak memory.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Result file.  [default: under benchmarks/results]")
    ] = None,
) -> None:
    """Times each loss beside eager PyTorch, torch.compile and its own bare GEMMs."""
    if context.invoked_subcommand is not None:
        return
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset} is not one of {', '.join(PRESETS)}")
    defaults = PRESETS[preset]
    names, where = _chosen(contenders, all_names(), "--contenders"), _device(device)
    if compiled is None:
        compiled = defaults.compiled or contenders is not None  # asked for by name
    if not compiled:
        names = tuple(name for name in names if name != COMPILED)
    losses = list(_chosen(loss, LOSSES, "--loss"))
    dtypes = [name.strip() for name in dtype.split(",")] if dtype else []
    try:
        cases = _cases(preset, losses, dtypes, n or [], m, d or [])
        backend_name(backend, where)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not cases:
        raise typer.BadParameter(f"preset {preset} has no case of {loss}")
    if threads is not None:
        torch.set_num_threads(threads)
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 132
    options = Options(
        contenders=names,
        rounds=rounds or defaults.rounds,
        backend=backend,
        forward=forward,
        memory=defaults.memory if memory is None else memory,
        device=where,
    )
    results = _measure(cases, options, progress)
    path = output or default_path(results)
    save(results, path)
    for table in rich_tables(results):
        console.print(table)
    console.print(f"results: {path}", soft_wrap=True)
    if any(row.contender == FASTCL and row.status != OK for row in results.rows):
        raise typer.Exit(1)  # a peer may fail, the library may not


def _measure(cases: list[Case], options: Options, progress: Console) -> Results:
    """All rows. The header is taken first: the tree may change while the run goes on."""
    header, others = make_header(options.device), OtherLoad()
    with progress.status("starting") as status:
        show = partial(progress.print, highlight=False, markup=False)
        rows, rates = run_cases(cases, dataclasses.replace(options, say=status.update, done=show))
    header = dataclasses.replace(header, gemm_tflops=rates, other_load=others())
    if header.other_load is not None and header.other_load > 0.1:
        progress.print(f"others kept {header.other_load} cores busy: these times are not clean")
    return Results(header, rows)


@app.command()
def table(file: Annotated[Path, typer.Argument(help="A result file.")]) -> None:
    """Prints a result file as Markdown."""
    typer.echo(markdown(_load(file)), nl=False)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A result file.")],
    output: Annotated[Path | None, typer.Option(help="[default: FILE with .png]")] = None,
) -> None:
    """Draws a result file."""
    from benchmarks.plot import save_plot

    target = output or file.with_suffix(".png")
    save_plot(_load(file), target)
    typer.echo(f"picture: {target}")


def _load(file: Path) -> Results:
    try:
        return load(file)
    except (SchemaError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Runs the command line."""
    app(prog_name="python -m benchmarks")


if __name__ == "__main__":
    main()
