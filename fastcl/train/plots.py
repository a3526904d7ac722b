"""The picture of a run: its curves, and a map of the held-out images."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from sklearn.manifold import TSNE  # type: ignore[import-untyped]

from fastcl.train.checkpoints import atomic_write
from fastcl.train.config import Config
from fastcl.train.evaluation import Array, Scores, Split
from fastcl.train.folder import RunFolder

Row = dict[str, Any]

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2563eb", "#ea7317"
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}


def draw(
    folder: RunFolder,
    config: Config,
    rows: list[Row],
    scores: dict[str, Scores],
    split: Split,
    names: tuple[str, ...],
) -> None:
    """Write the picture, atomically."""
    steps = [row for row in rows if row["event"] == "step"]
    checks = [row for row in rows if row["event"] == "eval"]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        # A Figure of its own: no pyplot, so no global state and no window system.
        figure = Figure(figsize=(13, 6.2), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.08, 1))  # type: ignore[misc]
        axes = left.subplots(2, 2, sharex=True)
        _curve(axes[0, 0], steps, "loss", "Loss")
        _similarities(axes[0, 1], steps)
        _curve(axes[1, 0], steps, "scale", "Scale (1 / temperature)")
        _accuracy(axes[1, 1], checks, scores)
        for axis in axes[1]:
            axis.set_xlabel("step")
        _embedding(right.subplots(), split, names)
        figure.suptitle(_title(config, scores), x=0.012, ha="left", color=INK, fontsize=13)
        atomic_write(folder.picture, lambda file: figure.savefig(file, format="png", dpi=130))


def _title(config: Config, scores: dict[str, Scores]) -> str:
    knn = scores["trained encoder"].knn.mean
    return (
        f"{config.method} on {config.data}: {config.epochs} epochs of batch {config.batch_size}, "
        f"seed {config.seed}; held-out kNN {knn:.1%}"
    )


def _curve(axis: Axes, steps: list[Row], key: str, title: str) -> None:
    x, y = [row["step"] for row in steps], np.array([row[key] for row in steps], dtype=float)
    axis.plot(x, y, color=BLUE, lw=1.4)
    axis.set_title(title)
    if np.ptp(y) < 1e-6:  # a constant: no axis of tiny offsets
        axis.set_ylim(0, 2 * float(y[0]))


def _similarities(axis: Axes, steps: list[Row]) -> None:
    x = [row["step"] for row in steps]
    for key, name, color in (
        ("positive_similarity", "positive pairs", BLUE),
        ("negative_similarity", "negative pairs", ORANGE),
    ):
        y = np.array([row[key] for row in steps], dtype=float)
        axis.plot(x, y, color=color, lw=1.4, label=name)
    axis.set_title("Mean cosine similarity")
    axis.legend(loc="center right", labelcolor=INK)


def _accuracy(axis: Axes, checks: list[Row], scores: dict[str, Scores]) -> None:
    x, y = [row["step"] for row in checks], [100 * row["knn"] for row in checks]
    axis.plot(x, y, color=BLUE, lw=1.4, marker="o", ms=3.5, label="encoder")
    raw = 100 * scores["raw pixels"].knn.mean
    axis.axhline(raw, color=FAINT, lw=1.2, ls="--", label="raw pixels")
    axis.set_title("Held-out kNN accuracy, %")
    axis.legend(loc="lower right", labelcolor=INK)


def _embedding(axis: Axes, split: Split, names: tuple[str, ...]) -> None:
    points = flatten(split.test)
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for label, name in enumerate(names):
        mine = points[split.test_labels == label]
        if not len(mine):
            continue
        color = colors[label % len(colors)]
        axis.scatter(mine[:, 0], mine[:, 1], s=16, color=color, alpha=0.75, lw=0)
        middle = np.median(mine, axis=0)
        top = np.sort(mine[np.argsort(np.abs(mine - middle).sum(1))][: len(mine) * 4 // 5, 1])[-1]
        axis.annotate(
            name, (middle[0], top), (0, 7), textcoords="offset points", ha="center",
            fontsize=11, weight="bold", color=color,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    axis.set_title("Held-out images, features of the encoder (t-SNE)")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def flatten(features: Array) -> Array:
    """Unit features in two dimensions by t-SNE, the same on every run."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)  # type: ignore[no-any-return]
