"""The bars that the CPU losses must clear, read off a run's rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases import BOTH, LOSSES, QUEUE
from benchmarks.contenders import EAGER_FORM, EAGER_VARIANT, FASTCL, GEMMS
from benchmarks.schema import Results, Row

SIZE, DIM = 8192, 512  # where the bars hold


@dataclass(frozen=True)
class Bar:
    """One bar: the figure must not exceed the limit."""

    title: str
    figure: float | None
    limit: float
    size: str = ""  # where it was measured, if not at the bar's own size

    @property
    def verdict(self) -> str:
        """Met, missed, or not measured."""
        if self.figure is None:
            return "not measured"
        verdict = "met" if self.figure <= self.limit else "missed"
        return f"{verdict}, but at {self.size}" if self.size else verdict


class _Rows:
    """Rows by loss, dtype and contender: at the bars' size where there is one."""

    def __init__(self, rows: list[Row]) -> None:
        self.found: dict[tuple[str, str, str], Row] = {}
        for row in sorted((r for r in rows if r.phase == BOTH), key=self._nearness):
            self.found[row.loss, row.dtype, row.contender] = row

    @staticmethod
    def _nearness(row: Row) -> tuple[bool, int]:
        return at_bar(row), row.n

    def get(self, loss: str, dtype: str, contender: str) -> Row | None:
        return self.found.get((loss, dtype, contender))


def at_bar(row: Row) -> bool:
    """Is this the size at which the bars are set?"""
    if row.loss == "moco":
        return (row.n, row.m, row.d) == (256, QUEUE, 128)
    return (row.n * 2 if row.loss == "nt_xent" else row.n, row.d) == (SIZE, DIM)


def check(results: Results) -> list[Bar]:
    """The bars that have something measured; none for a run on a GPU."""
    if results.header.device.kind != "cpu":
        return []
    rows = _Rows(results.rows)
    return [bar for bar in (*_speed(rows), *_memory(rows), *_bf16(rows)) if bar.figure is not None]


def _bar(title: str, figure: float | None, limit: float, *where: Row | None) -> Bar:
    away = [row for row in where if row is not None and not at_bar(row)]
    return Bar(title, figure, limit, f"{away[0].n} x {away[0].d}" if away else "")


def _speed(rows: _Rows) -> Iterator[Bar]:
    for loss, contender, limit in (
        ("clip", EAGER_FORM, 0.45),
        ("clip", EAGER_VARIANT, 0.45),
        ("clip", GEMMS, 1.10),
        ("siglip", EAGER_FORM, 0.50),
    ):
        ours, theirs = rows.get(loss, "float32", FASTCL), rows.get(loss, "float32", contender)
        title = f"{loss} float32: time / {contender}'s"
        yield _bar(title, _time_ratio(ours, theirs), limit, ours, theirs)


def _memory(rows: _Rows) -> Iterator[Bar]:
    for loss in ("clip", "siglip"):
        ours, eager = (rows.get(loss, "float32", name) for name in (FASTCL, EAGER_FORM))
        figure = None
        if ours and eager and ours.extra_bytes is not None and eager.extra_bytes:
            figure = ours.extra_bytes / eager.extra_bytes
        yield _bar(f"{loss} float32: extra memory / eager's", figure, 0.05, ours, eager)


def _bf16(rows: _Rows) -> Iterator[Bar]:
    for loss in LOSSES:
        ours, wide = (rows.get(loss, dtype, FASTCL) for dtype in ("bfloat16", "float32"))
        yield _bar(f"{loss}: bfloat16's time / float32's", _time_ratio(ours, wide), 1.0, ours, wide)
        eager = rows.get(loss, "bfloat16", EAGER_FORM)
        # Errors are measured on problems of at most 2048 rows whatever the case's size.
        title = f"{loss} bfloat16: error / eager's, worst of loss and gradients"
        yield Bar(title, _error_ratio(ours, eager), 1.0)


def _time_ratio(ours: Row | None, other: Row | None) -> float | None:
    if ours is None or other is None or ours.seconds is None or other.seconds is None:
        return None
    if (ours.n, ours.m, ours.d) != (other.n, other.m, other.d):
        return None
    in_rounds = {GEMMS: ours.of_gemms, EAGER_FORM: ours.of_eager}.get(other.contender)
    if in_rounds is not None and ours.dtype == other.dtype:
        return in_rounds
    return ours.seconds.median / other.seconds.median


def _error_ratio(ours: Row | None, eager: Row | None) -> float | None:
    if ours is None or eager is None or ours.errors is None or eager.errors is None:
        return None
    pairs = [(ours.errors.loss, eager.errors.loss)]
    pairs += [(e, eager.errors.gradients[name]) for name, e in ours.errors.gradients.items()]
    # None is an error that is not finite: ours misses the bar, eager's is beaten by any number.
    return max(_over(mine, theirs) for mine, theirs in pairs)


def _over(mine: float | None, theirs: float | None) -> float:
    if mine is None:
        return float("inf")
    if theirs is None or mine == 0:
        return 0.0
    return mine / theirs if theirs else float("inf")
