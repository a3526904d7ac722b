"""The methods: each owns its modules and turns a batch into a loss and a few numbers to log.

To add one, write a class with `@register("name")` whose `forward` takes a `Batch`; the class
attributes say what it needs of the data. A loss that is given `group=self.group` also runs over
several processes. Nothing else has to change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcl import clip_loss, info_nce, nt_xent, siglip_loss
from fastcl.caching import GradCacheStep
from fastcl.train.captions import Captions
from fastcl.train.config import Config
from fastcl.train.data import Batch, Dataset
from fastcl.train.diagnostics import PairSums, cross_sums, two_view_sums
from fastcl.train.encoders import ImageEncoder, ProjectionHead, TextEncoder


@dataclass(frozen=True)
class StepOutput:
    """The loss, and 0-dim tensors to log, which are read from the device only now and then.

    Of several processes each has the numbers of its rows: `pairs` says how to make those of the
    whole batch of them, and without it their means are logged.
    """

    loss: Tensor
    scale: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    pairs: PairSums | None = None

    @classmethod
    def of(cls, loss: Tensor, scale: Tensor, pairs: PairSums) -> StepOutput:
        """With the similarities of these pairs."""
        return cls(loss, scale, *pairs.means(), pairs)


class Method(nn.Module, ABC):
    """Base of all methods. `encoder` is what evaluation looks at, without any head."""

    views: ClassVar[int]  # augmented views of each image in a batch
    captions: ClassVar[bool] = False  # whether a batch also has a caption of each image
    defaults: ClassVar[dict[str, Any]]  # settings where this method differs from Config's
    group: Any = None  # of the processes over which a batch is spread: every loss takes it
    cached: GradCacheStep | None = None  # where encoders run chunk by chunk

    def __init__(self, config: Config, dataset: Dataset, captions: Captions | None) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(dataset.train_images.shape[1])

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one batch and what to log of it."""

    def after_step(self) -> None:
        """Called after each step of the optimizer: clamps, momentum updates, queues."""

    def zero_shot(self, images: Tensor, prompts: Tensor) -> Tensor | None:
        """Scores [N, classes] from prompts [classes, templates, context], where there is text."""
        return None

    def embed(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Unit embeddings, in the dtype of the chosen precision.

        Autocast covers the network alone: the loss chooses its own accumulation dtype.
        """
        low = self.config.precision == "bf16"
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=low):
            raw: Tensor = self.cached(network, inputs) if self.cached else network(inputs)
        return F.normalize(raw.float(), dim=-1).to(raw.dtype)


METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Enter a method into the table under the name that `--method` takes."""

    def enter(method: type[Method]) -> type[Method]:
        METHODS[name] = method
        return method

    return enter


class TwoViews(Method):
    """Self-supervised: two views of an image are a positive pair."""

    views = 2

    def __init__(self, config: Config, dataset: Dataset, captions: Captions | None) -> None:
        super().__init__(config, dataset, captions)
        head = ProjectionHead(self.encoder.features, config.embedding_dim)
        self.network = nn.Sequential(self.encoder, head)
        self.register_buffer("scale", torch.tensor(1.0 / config.temperature), persistent=False)
        self.scale: Tensor

    def embed_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both views through the network in one pass."""
        z0, z1 = self.embed(self.network, torch.cat(batch.views)).chunk(2)
        return z0, z1


@register("simclr")
class SimCLR(TwoViews):
    """NT-Xent: all other views of the batch are negatives."""

    defaults: ClassVar[dict[str, Any]] = {"temperature": 0.5}

    def forward(self, batch: Batch) -> StepOutput:
        z0, z1 = self.embed_views(batch)
        loss = nt_xent(
            z0,
            z1,
            temperature=self.config.temperature,
            group=self.group,
            backend=self.config.backend,
        )
        return StepOutput.of(loss, self.scale, two_view_sums(z0, z1))


@register("infonce")
class InfoNCE(TwoViews):
    """InfoNCE in both directions: the other images' second views are negatives of the first."""

    defaults: ClassVar[dict[str, Any]] = {"temperature": 0.5}

    def forward(self, batch: Batch) -> StepOutput:
        query, key = self.embed_views(batch)
        loss = info_nce(
            query,
            key,
            temperature=self.config.temperature,
            symmetric=True,
            group=self.group,
            backend=self.config.backend,
        )
        return StepOutput.of(loss, self.scale, cross_sums(query, key))


class ImageText(Method):
    """An image and its caption are a positive pair; captions of equal class are no negatives."""

    views = 1
    captions = True
    max_scale: ClassVar[float] = 100.0

    def __init__(self, config: Config, dataset: Dataset, captions: Captions | None) -> None:
        super().__init__(config, dataset, captions)
        assert captions is not None
        head = ProjectionHead(self.encoder.features, config.embedding_dim)
        self.image_network = nn.Sequential(self.encoder, head)
        self.text_network = TextEncoder(captions.vocabulary, captions.context, config.embedding_dim)
        self.num_ids = len(dataset.class_names)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.temperature)))

    @abstractmethod
    def loss(self, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        """The loss of unit embeddings."""

    def forward(self, batch: Batch) -> StepOutput:
        assert batch.tokens is not None
        image = self.embed(self.image_network, batch.views[0])
        text = self.embed(self.text_network, batch.tokens)
        scale = self.log_scale.exp()
        loss = self.loss(image, text, scale, batch.ids)
        pairs = cross_sums(image, text, batch.ids, self.num_ids)
        return StepOutput.of(loss, scale.detach(), pairs)

    def after_step(self) -> None:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))

    def zero_shot(self, images: Tensor, prompts: Tensor) -> Tensor | None:
        """Similarity to each class's mean prompt (the ensembling of CLIP)."""
        image = self.embed(self.image_network, images).float()
        text = self.embed(self.text_network, prompts.flatten(0, 1)).float()
        classes = F.normalize(text.reshape(*prompts.shape[:2], -1).mean(dim=1), dim=-1)
        return image @ classes.T


@register("clip")
class Clip(ImageText):
    """The symmetric softmax loss with a learned scale, clamped at 100."""

    defaults: ClassVar[dict[str, Any]] = {"temperature": 0.07}

    def loss(self, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        backend = self.config.backend
        return clip_loss(image, text, scale, ids=ids, group=self.group, backend=backend)


@register("siglip")
class SigLip(ImageText):
    """The sigmoid loss with learned scale and bias, from their published initial values."""

    defaults: ClassVar[dict[str, Any]] = {"temperature": 0.1}

    def __init__(self, config: Config, dataset: Dataset, captions: Captions | None) -> None:
        super().__init__(config, dataset, captions)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def loss(self, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        return siglip_loss(
            image,
            text,
            scale,
            self.logit_bias,
            ids=ids,
            group=self.group,
            backend=self.config.backend,
        )


def build_method(config: Config, dataset: Dataset, captions: Captions | None) -> Method:
    """The method with initial weights that depend on the seed alone.

    Leaves torch's generator as it was, so that the untrained encoder can be made again later.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return METHODS[config.method](config, dataset, captions)
