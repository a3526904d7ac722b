"""What the features are worth: kNN and linear probes, fitted on training images alone.

Every row of the table goes through the same procedure, with the same draws of labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler, normalize  # type: ignore[import-untyped]
from torch import Tensor, nn

from fastcl.train.captions import Captions
from fastcl.train.data import Dataset
from fastcl.train.methods import Method

Array = NDArray[Any]
LABELS_PER_CLASS = (1, 5, 10)
DRAWS = 20
NEIGHBOURS = 5


@dataclass(frozen=True)
class Split:
    """Features and labels of the training and of the held-out images."""

    train: Array
    train_labels: Array
    test: Array
    test_labels: Array


@dataclass(frozen=True)
class Score:
    """Mean accuracy over draws of labels, and their standard deviation; one draw has none."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Scores:
    """One row of the table; `linear_probe` has the labels per class as keys, or "all"."""

    knn: Score
    linear_probe: dict[str, Score]
    zero_shot: Score | None = None


def features(network: nn.Module, images: Tensor, batch_size: int = 1024) -> Array:
    """The outputs of a network in evaluation mode, in float32."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        rows = [network(images[i : i + batch_size].to(device)).float().cpu() for i in starts]
    network.train(was_training)
    return torch.cat(rows).numpy()  # type: ignore[no-any-return]


def encoder_split(network: nn.Module, dataset: Dataset) -> Split:
    """The features of a data set."""
    return Split(
        features(network, dataset.train_images),
        dataset.train_labels.numpy(),
        features(network, dataset.test_images),
        dataset.test_labels.numpy(),
    )


def pixel_split(dataset: Dataset) -> Split:
    """The pixels themselves as features."""
    return Split(
        dataset.train_images.flatten(1).numpy(),
        dataset.train_labels.numpy(),
        dataset.test_images.flatten(1).numpy(),
        dataset.test_labels.numpy(),
    )


def knn_accuracy(split: Split, neighbours: int = NEIGHBOURS) -> float:
    """Accuracy of a vote among the nearest training images by cosine similarity."""
    model = KNeighborsClassifier(neighbours).fit(normalize(split.train), split.train_labels)
    return float(model.score(normalize(split.test), split.test_labels))


def draw_labels(labels: Array, per_class: int, rng: np.random.Generator) -> Array:
    """The indices of `per_class` random examples of every class."""
    classes = np.unique(labels)
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in classes]
    return np.concatenate(drawn)


def linear_probe(split: Split, labels_per_class: int | None = None, draws: int = DRAWS) -> Score:
    """Accuracy of logistic regression on standardised features with few labels, or with all.

    The same draws of labels on every call, whatever the features.
    """
    scaler = StandardScaler().fit(split.train)
    train, test = scaler.transform(split.train), scaler.transform(split.test)
    if labels_per_class is None:
        return Score(_fit_and_score(train, split.train_labels, test, split.test_labels))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        rows = draw_labels(split.train_labels, labels_per_class, rng)
        found.append(_fit_and_score(train[rows], split.train_labels[rows], test, split.test_labels))
    return Score(float(np.mean(found)), float(np.std(found)))


def _fit_and_score(train: Array, labels: Array, test: Array, test_labels: Array) -> float:
    model = LogisticRegression(max_iter=1000).fit(train, labels)
    return float(model.score(test, test_labels))


def zero_shot_accuracy(method: Method, dataset: Dataset, captions: Captions) -> float:
    """Accuracy of the class whose prompts are nearest, without a labelled image."""
    was_training = method.training
    method.eval()
    device = next(method.parameters()).device
    with torch.no_grad():
        scores = method.zero_shot(dataset.test_images.to(device), captions.table().to(device))
    method.train(was_training)
    assert scores is not None
    return float((scores.argmax(dim=1).cpu() == dataset.test_labels).float().mean())


def score_split(split: Split) -> Scores:
    """kNN and all linear probes."""
    probes = {str(k): linear_probe(split, k) for k in LABELS_PER_CLASS}
    probes["all"] = linear_probe(split)
    return Scores(Score(knn_accuracy(split)), probes)


def evaluate(
    method: Method, untrained: Method, dataset: Dataset, captions: Captions | None
) -> dict[str, Scores]:
    """The rows of the accuracy table: raw pixels, the untrained and the trained encoder."""
    rows = {"raw pixels": score_split(pixel_split(dataset))}
    for name, each in (("untrained encoder", untrained), ("trained encoder", method)):
        scores = score_split(encoder_split(each.encoder, dataset))
        if captions is not None:
            zero_shot = Score(zero_shot_accuracy(each, dataset, captions))
            scores = Scores(scores.knn, scores.linear_probe, zero_shot)
        rows[name] = scores
    return rows
