"""kNN and probes on cases whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcl.train.captions import Captions
from fastcl.train.config import Config
from fastcl.train.data import Dataset
from fastcl.train.evaluation import (
    Split,
    draw_labels,
    encoder_split,
    features,
    knn_accuracy,
    linear_probe,
    pixel_split,
    score_split,
    zero_shot_accuracy,
)
from fastcl.train.methods import build_method
from fastcl.train.run import new_config


def two_clusters(spread: float = 0.1, wrong: int = 0) -> Split:
    """40 + 40 points around (1, 0) and (0, 1); `wrong` held-out labels are lies."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    train = np.eye(2)[labels] + spread * rng.standard_normal((40, 2))
    test = np.eye(2)[labels] + spread * rng.standard_normal((40, 2))
    told = labels.copy()
    told[:wrong] = 1 - told[:wrong]
    return Split(train, labels, test, told)


@pytest.mark.parametrize(("wrong", "expected"), [(0, 1.0), (10, 0.75)])
def test_separable_clusters(wrong: int, expected: float) -> None:
    split = two_clusters(wrong=wrong)
    assert knn_accuracy(split) == expected
    assert linear_probe(split).mean == expected
    assert linear_probe(split).std is None
    few = linear_probe(split, 1)
    assert few.mean == expected
    assert few.std == 0.0


def test_knn_uses_the_angle_and_votes() -> None:
    train = np.array([[1, 0], [2, 0.1], [3, -0.1], [0, 1], [0.1, 9]])
    labels = np.array([0, 0, 0, 1, 1])
    test = np.array([[0.02, 0.0], [0, 0.02]])  # short, but in clear directions
    split = Split(train, labels, test, np.array([0, 1]))
    assert knn_accuracy(split, neighbours=1) == 1.0
    assert knn_accuracy(split, neighbours=5) == 0.5  # class 0 has the majority everywhere


def test_scores_do_not_depend_on_held_out_labels_or_on_units() -> None:
    noisy = two_clusters(spread=0.6)
    scaled = replace(noisy, train=noisy.train * 1000, test=noisy.test * 1000)
    assert linear_probe(scaled, 5) == linear_probe(noisy, 5)
    assert linear_probe(noisy, 5).std > 0  # type: ignore[operator]
    flipped = replace(noisy, test_labels=1 - noisy.test_labels)
    assert linear_probe(flipped).mean == pytest.approx(1 - linear_probe(noisy).mean)


def test_draws_have_so_many_of_each_class_and_differ() -> None:
    labels = np.repeat(np.arange(4), [5, 9, 20, 6])
    rng = np.random.default_rng(0)
    first, second = draw_labels(labels, 5, rng), draw_labels(labels, 5, rng)
    for rows in (first, second):
        assert np.bincount(labels[rows]).tolist() == [5, 5, 5, 5]
        assert len(np.unique(rows)) == 20
    assert set(first.tolist()) != set(second.tolist())


def test_raw_pixels_score_what_they_are_known_to(dataset: Dataset) -> None:
    scores = score_split(pixel_split(dataset))
    assert scores.knn.mean == pytest.approx(0.959, abs=0.01)
    probes = [scores.linear_probe[key].mean for key in ("1", "5", "10", "all")]
    assert probes == sorted(probes)
    assert probes[0] == pytest.approx(0.57, abs=0.05)
    assert probes[3] == pytest.approx(0.925, abs=0.01)


def test_features_are_taken_in_evaluation_mode_and_the_mode_comes_back() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5))
    images = torch.randn(10, 1, 2, 2)
    found = features(network, images, batch_size=4)
    assert network.training
    expected = network[1](images.flatten(1)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    network.eval()
    features(network, images)
    assert not network.training


def test_zero_shot_picks_the_nearest_class(
    dataset: Dataset, captions: Captions, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Config = new_config(method="clip")
    method = build_method(config, dataset, captions)

    def knows_all_but_nine(images: Tensor, prompts: Tensor) -> Tensor:
        assert prompts.shape[0] == 10
        scores = torch.nn.functional.one_hot(dataset.test_labels, 10).float()
        scores[:, 9] = -1
        return scores

    monkeypatch.setattr(method, "zero_shot", knows_all_but_nine)
    nines = float((dataset.test_labels == 9).float().mean())
    assert zero_shot_accuracy(method, dataset, captions) == pytest.approx(1 - nines)


def test_an_encoder_is_judged_without_its_head(dataset: Dataset) -> None:
    method = build_method(new_config(method="simclr"), dataset, None)
    split = encoder_split(method.encoder, dataset)
    assert split.train.shape == (1157, 128)
    assert split.test.shape == (640, 128)
