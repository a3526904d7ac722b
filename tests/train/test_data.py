"""The split, and what the batches are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits

from fastcl.train.captions import Captions
from fastcl.train.data import DIGITS_TRAIN, Batches, Dataset

CPU = torch.device("cpu")


def batches(dataset: Dataset, **given: object) -> Batches:
    options = {"views": 2, "captions": None, "seed": 0, "device": CPU, **given}
    return Batches(dataset, 128, **options)  # type: ignore[arg-type]


def test_the_split_is_complete_and_in_order(dataset: Dataset) -> None:
    bunch = load_digits()
    assert (len(dataset.train_images), len(dataset.test_images)) == (1157, 640)
    images = torch.cat([dataset.train_images, dataset.test_images])
    labels = torch.cat([dataset.train_labels, dataset.test_labels])
    assert torch.equal(images[:, 0] * 16, torch.tensor(bunch.images, dtype=torch.float32))
    assert torch.equal(labels, torch.tensor(bunch.target))
    assert images.min() == 0
    assert images.max() == 1


def test_the_split_lies_between_two_sheets() -> None:
    """Every sheet starts with three rows of 0 to 9; so do the held-out images."""
    labels = load_digits().target[DIGITS_TRAIN : DIGITS_TRAIN + 30]
    assert labels.tolist() == [*range(10)] * 3


def test_no_held_out_image_is_in_the_training_set(dataset: Dataset) -> None:
    train = {tuple(row.tolist()) for row in dataset.train_images.flatten(1)}
    held_out = {tuple(row.tolist()) for row in dataset.test_images.flatten(1)}
    assert not train & held_out
    assert set(dataset.test_labels.tolist()) == set(range(10))


def test_batches_never_read_held_out_images(dataset: Dataset) -> None:
    poisoned = replace(
        dataset,
        test_images=torch.full_like(dataset.test_images, torch.nan),
        test_labels=torch.full_like(dataset.test_labels, -1),
    )
    for ours, theirs in zip(_epoch_of(dataset, seed=3), _epoch_of(poisoned, seed=3), strict=True):
        assert torch.equal(ours, theirs)


def _epoch_of(dataset: Dataset, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [view for batch in batches(dataset, seed=seed).epoch() for view in batch.views]


def test_an_epoch_shows_each_training_image_at_most_once(dataset: Dataset) -> None:
    numbered = replace(dataset, train_labels=torch.arange(len(dataset.train_images)))
    stream = batches(numbered)
    first = torch.cat([batch.ids for batch in stream.epoch()])
    second = torch.cat([batch.ids for batch in stream.epoch()])
    assert len(first) == len(stream) * 128 == 1152
    assert len(first.unique()) == 1152
    assert not torch.equal(first, second)
    again = torch.cat([batch.ids for batch in batches(numbered).epoch()])
    assert torch.equal(first, again)
    other = torch.cat([batch.ids for batch in batches(numbered, seed=1).epoch()])
    assert not torch.equal(first, other)


def test_views_are_different_images_of_the_same_digit(dataset: Dataset) -> None:
    torch.manual_seed(0)
    stream = batches(dataset)
    batch = stream.batch(torch.arange(256))
    v0, v1 = (view.flatten(1) for view in batch.views)
    assert v0.shape == (256, 64)
    assert (v0 != v1).any(dim=1).all()
    partner = (v0 - v1).norm(dim=1).mean()
    stranger = (v0 - v1.roll(1, 0)).norm(dim=1).mean()
    assert partner < 0.93 * stranger


def test_a_caption_names_the_class_of_its_image(dataset: Dataset, captions: Captions) -> None:
    stream = batches(dataset, views=1, captions=captions)
    seen = set()
    batch = next(stream.epoch())
    assert batch.tokens is not None
    for tokens, label in zip(batch.tokens.tolist(), batch.ids.tolist(), strict=True):
        text = captions.decode(tokens)
        assert text in captions.texts[label]
        seen.add(captions.texts[label].index(text))
    assert len(seen) > 4


@pytest.mark.parametrize("size", [1157, 600])
def test_batches_up_to_the_whole_training_set(dataset: Dataset, size: int) -> None:
    stream = Batches(dataset, size, views=1, captions=None, seed=0, device=CPU)
    assert [len(batch.ids) for batch in stream.epoch()] == [size]
