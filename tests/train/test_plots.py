"""The picture: what of it can be checked without looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastcl.train.evaluation import Score, Scores, Split
from fastcl.train.folder import RunFolder
from fastcl.train.plots import draw, flatten
from fastcl.train.run import new_config


def clusters(n: int = 90, classes: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return 5 * np.eye(classes, 16)[labels] + 0.3 * rng.standard_normal((n, 16)), labels


def test_the_map_keeps_clusters_apart_and_is_the_same_again() -> None:
    features, labels = clusters()
    points = flatten(features)
    assert points.shape == (90, 2)
    centres = np.stack([points[labels == c].mean(axis=0) for c in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.98
    np.testing.assert_array_equal(points, flatten(features))


def test_the_map_takes_few_points_and_zero_features() -> None:
    assert np.isfinite(flatten(np.vstack([np.zeros((1, 4)), np.eye(4)]))).all()


def test_the_picture_shows_the_curves_the_classes_and_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    rows: list[dict[str, Any]] = [
        {
            "event": "step", "step": i, "loss": 3.0 / i, "scale": 2.0,
            "positive_similarity": 0.9, "negative_similarity": None if i == 2 else 0.1,
        }
        for i in range(1, 6)
    ]  # fmt: skip
    rows.append({"event": "eval", "step": 5, "epoch": 1, "knn": 0.75})
    features, labels = clusters()
    scores = {name: Scores(Score(0.5), {}) for name in ("raw pixels", "trained encoder")}
    folder = RunFolder(tmp_path)
    names = ("a cat", "a dog", "a cow", "never seen")
    split = Split(features, labels, features, labels)
    draw(folder, new_config(method="clip"), rows, scores, split, names)

    assert folder.picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    axes = figures[0].get_axes()
    texts = {text.get_text() for axis in axes for text in axis.texts}
    assert texts == {"a cat", "a dog", "a cow"}
    lines = [line.get_ydata() for axis in axes for line in axis.lines]
    assert any(np.array_equal(line, [3.0 / i for i in range(1, 6)]) for line in lines)
    assert any(np.array_equal(line, [75.0]) for line in lines)
    negative = [0.1, np.nan, 0.1, 0.1, 0.1]
    assert any(np.array_equal(line, negative, equal_nan=True) for line in lines[1:3])
