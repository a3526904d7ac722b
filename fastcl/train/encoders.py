"""The encoders: a small convolutional one for images, a small transformer for captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcl.train.captions import PAD_ID


class ImageEncoder(nn.Module):
    """Three 3 x 3 convolutions, then the mean over positions: [N, C, H, W] to [N, features].

    GroupNorm rather than BatchNorm: each image is encoded on its own, so gradient caching stays
    exact and a momentum encoder needs no shuffling.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth, width in enumerate(widths):
            stride = 1 if depth == 0 else 2
            layers += [
                nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
            in_channels = width
        self.layers = nn.Sequential(*layers)
        self.features = in_channels

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.layers(images)
        return maps.mean(dim=(2, 3))


class ProjectionHead(nn.Sequential):
    """The two-layer head of SimCLR: losses see its output, evaluation sees its input."""

    def __init__(self, features: int, embedding_dim: int) -> None:
        super().__init__(
            nn.Linear(features, features, bias=False),
            nn.LayerNorm(features),
            nn.ReLU(),
            nn.Linear(features, embedding_dim),
        )


class TextEncoder(nn.Module):
    """A two-layer transformer; the mean over the tokens that are no padding, then a projection."""

    def __init__(self, vocabulary: int, context: int, embedding_dim: int, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=PAD_ID)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True,
            norm_first=True, activation="gelu",
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embedding_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PAD_ID
        x = self.layers(self.tokens(tokens) + self.positions, src_key_padding_mask=padding)
        x = self.norm(x).masked_fill(padding.unsqueeze(-1), 0.0)
        kept = (~padding).sum(dim=1, keepdim=True)
        pooled: Tensor = x.sum(dim=1) / kept
        return self.projection(pooled)  # type: ignore[no-any-return]
