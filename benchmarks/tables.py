"""Results as tables: in the terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

from rich.table import Table

from benchmarks.bars import Bar, check
from benchmarks.schema import OK, Errors, Results, Row

COLUMNS = (
    "contender",
    "ms (quartiles)",
    "/ eager",
    "/ GEMMs",
    "TFLOP/s",
    "of peak GEMM",
    "extra MiB",
    "loss error",
    "grad error",
)


def cells(row: Row) -> list[str]:
    """One row's figures in the order of COLUMNS."""
    if row.status != OK or row.seconds is None:
        return [row.contender, row.status] + [""] * (len(COLUMNS) - 2)
    s = row.seconds
    return [
        row.contender,
        f"{_ms(s.median)} ({_ms(s.q1)} to {_ms(s.q3)})",
        _number(row.of_eager, "{:.2f}"),
        _number(row.of_gemms, "{:.2f}"),
        _number(row.tflops, "{:.3f}"),
        _number(row.of_machine, "{:.0%}"),
        _bytes(row.extra_bytes),
        _number(row.errors.loss if row.errors else None, "{:.1e}"),
        _worst(row.errors),
    ]


def rich_tables(results: Results) -> list[Table]:
    """A table for each case and phase, and one of the bars."""
    tables = []
    for (case, phase), rows in _groups(results).items():
        table = Table(title=f"{case}, {phase}", title_justify="left", caption=_caption(rows))
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*cells(row))
        tables.append(table)
    if bars := check(results):
        table = Table(title="Bars", title_justify="left")
        for i, column in enumerate(_BAR_COLUMNS):
            table.add_column(column, justify="right" if i in (1, 2) else "left")
        for bar in bars:
            style = "green" if bar.verdict == "met" else "red" if bar.verdict == "missed" else ""
            table.add_row(*_bar_cells(bar), style=style)
        tables.append(table)
    return tables


def markdown(results: Results) -> str:
    """The same as Markdown, with the run that it comes from above."""
    parts = [_run(results)]
    for (case, phase), rows in _groups(results).items():
        parts.append(f"### {case}, {phase}\n\n" + _markdown(COLUMNS, [cells(row) for row in rows]))
        if caption := _caption(rows):
            parts.append(caption)
    if bars := check(results):
        parts.append("### Bars\n\n" + _markdown(_BAR_COLUMNS, [_bar_cells(bar) for bar in bars]))
    return "\n\n".join(parts) + "\n"


_BAR_COLUMNS = ("bar", "figure", "limit", "verdict")


def _bar_cells(bar: Bar) -> list[str]:
    return [bar.title, _number(bar.figure, "{:.3f}"), f"{bar.limit:.2f}", bar.verdict]


def _groups(results: Results) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.case, row.phase), []).append(row)
    return groups


def _caption(rows: list[Row]) -> str:
    notes = [f"{row.contender}: {row.note}" for row in rows if row.note]
    sizes = {(row.errors.n, row.errors.m) for row in rows if row.errors}
    notes += [f"errors at N = {n}, M = {m}" for n, m in sorted(sizes)]
    return "; ".join(notes)


def _run(results: Results) -> str:
    h = results.header
    tree = " with local changes" if h.dirty else ""
    rates = ", ".join(f"{dtype} {rate:.3f}" for dtype, rate in h.gemm_tflops.items())
    features = ", ".join(h.device.features)
    lines = [
        f"`{h.command}`, {h.created}, commit {h.commit}{tree}.",
        f"{h.device.name} ({features}), {h.device.cores} cores, {h.threads} threads, "
        f"{h.device.memory_gib} GiB; cores that others kept busy meanwhile: {h.other_load}.",
        f"torch {h.versions.get('torch')}, fastcl {h.versions.get('fastcl')} "
        f"({h.isa.get('fastcl') or 'not compiled'}). "
        f"One large square product, TFLOP/s: {rates}.",
    ]
    return "\n".join(lines)


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [" | ".join(line).replace("\n", " ") for line in (columns, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}"


def _worst(errors: Errors | None) -> str:
    if errors is None:
        return ""
    values = list(errors.gradients.values())
    finite = [v for v in values if v is not None]
    return f"{max(finite):.1e}" if len(finite) == len(values) and finite else "not finite"
