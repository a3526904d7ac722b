"""The embedded data, its fixed split, the augmentation, and the stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import kornia.augmentation as K
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

from fastcl.train.captions import Captions

# scikit-learn's digits come sheet by sheet: the labels repeat the same form of about 130 digits
# per writer. Nine sheets train and the last five are held out, so no held-out image shares its
# sheet with a training image. (A shuffled split would: it scores raw pixels 2 points too high.)
DIGITS_TRAIN = 1157


@dataclass(frozen=True)
class Dataset:
    """Images in [0, 1] as [N, C, H, W] and labels in [0, len(class_names)), split for good."""

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; nothing is downloaded."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    cut = DIGITS_TRAIN
    return Dataset("digits", names, images[:cut], labels[:cut], images[cut:], labels[cut:])


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def augmentation() -> nn.Module:
    """Slant, shift and size of the writing, its contrast, and sensor noise.

    Parameters come from torch's global generator, which the checkpoint holds.
    """
    return nn.Sequential(
        K.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=(-15, 15), p=1.0),
        K.RandomContrast((0.6, 1.4), p=1.0),
        K.RandomGaussianNoise(std=0.1, p=1.0),
    )


@dataclass(frozen=True)
class Batch:
    """Augmented views of the same images, and a caption of each where the method asks for it."""

    views: tuple[Tensor, ...]
    tokens: Tensor | None
    ids: Tensor  # the class: captions of one class mean the same, so they are no negatives

    def part(self, rank: int, size: int) -> Batch:
        """The rows of one of `size` processes, in order; the first may have one more."""

        def own(x: Tensor) -> Tensor:
            return x.tensor_split(size)[rank]

        tokens = None if self.tokens is None else own(self.tokens)
        return Batch(tuple(own(view) for view in self.views), tokens, own(self.ids))


class Batches:
    """Shuffled training batches, an epoch at a time; the last incomplete batch is left out.

    Draws the order and the captions from a generator of its own, and never reads held-out images.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        views: int,
        captions: Captions | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.batch_size = batch_size
        self.views = views
        self.images = dataset.train_images.to(device)
        self.labels = dataset.train_labels.to(device)
        self.tokens = None if captions is None else captions.table().to(device)
        self.augment = augmentation()
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self) -> Iterator[Batch]:
        """One pass over the training images in a fresh order."""
        order = torch.randperm(len(self.images), generator=self.generator)
        for rows in order[: len(self) * self.batch_size].view(-1, self.batch_size):
            yield self.batch(rows.to(self.images.device))

    def batch(self, rows: Tensor) -> Batch:
        """The batch of these training images."""
        images, labels = self.images[rows], self.labels[rows]
        with torch.no_grad():
            views = tuple(self.augment(images) for _ in range(self.views))
        return Batch(views, self._captions(labels), labels)

    def _captions(self, labels: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        templates = self.tokens.shape[1]
        chosen = torch.randint(templates, (len(labels),), generator=self.generator)
        return self.tokens[labels, chosen.to(labels.device)]
