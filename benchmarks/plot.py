"""A picture of a result file: time against size where sizes vary, else bars beside eager."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import BOTH
from benchmarks.schema import Results, Row


def save_plot(results: Results, path: Path) -> None:
    """Draws a panel for each loss and dtype, and writes it as `path`'s suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.seconds is not None and row.phase == BOTH:
            panels.setdefault((row.loss, row.dtype), []).append(row)
    names = dict.fromkeys(row.contender for rows in panels.values() for row in rows)
    colors = {name: f"C{i}" for i, name in enumerate(names)}  # the same in every panel
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.2 * across, 3.2 * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((loss, dtype), rows) in zip(axes.flat, panels.items(), strict=False):
        assert isinstance(axis, Axes)
        sizes = {"n": {r.n for r in rows}, "d": {r.d for r in rows}}
        if max(map(len, sizes.values())) == 1:
            times = [1e3 * r.seconds.median for r in rows if r.seconds]
            low = [1e3 * (r.seconds.median - r.seconds.q1) for r in rows if r.seconds]
            high = [1e3 * (r.seconds.q3 - r.seconds.median) for r in rows if r.seconds]
            run = [r.contender for r in rows]
            axis.barh(run, times, xerr=[low, high], color=[colors[name] for name in run])
            axis.invert_yaxis()
            axis.set_xlabel("ms (median, quartiles)")
            axis.set_title(rows[0].case)
            continue
        by = "n" if len(sizes["n"]) > 1 else "d"
        common = {getattr(r, "d" if by == "n" else "n") for r in rows}
        fixed = max(common, key=lambda v: len({getattr(r, by) for r in _at(rows, by, v)}))
        for contender in dict.fromkeys(r.contender for r in rows):
            line = [r for r in _at(rows, by, fixed) if r.contender == contender]
            line.sort(key=lambda r: int(getattr(r, by)))
            times = [1e3 * r.seconds.median for r in line if r.seconds]
            x = [getattr(r, by) for r in line]
            axis.loglog(x, times, marker="o", color=colors[contender], label=contender)
        axis.set_xticks(sorted(sizes[by]), [str(size) for size in sorted(sizes[by])])
        axis.minorticks_off()
        axis.set_xlabel(by.upper())
        axis.set_ylabel("ms (median)")
        axis.set_title(f"{loss}, {dtype}, {'D' if by == 'n' else 'N'} = {fixed}")
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _at(rows: list[Row], by: str, fixed: int) -> list[Row]:
    return [r for r in rows if getattr(r, "d" if by == "n" else "n") == fixed]
