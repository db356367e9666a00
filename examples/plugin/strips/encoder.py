"""An image encoder: mean and spread of the colours in the parts of a tile, and one layer that trains."""

from __future__ import annotations

import torch
from torch import nn

from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.weights import Weights


class ColourEncoder(ImageEncoder):
    """All that stexp does with an encoder (freezing, resizing, keeping features) around a model of one's own."""

    def create(self, architecture: str, weights: Weights | None, model_args: dict) -> nn.Module:
        """The model; a real one would load `weights.checkpoint`."""
        return Colours()


class Colours(nn.Module):
    """Tiles (B, 3, H, W), normalised, to features (B, F)."""

    num_features = 32

    def __init__(self, parts: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(parts)
        self.layer = nn.Linear(6 * parts**2, self.num_features)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean = self.pool(image)
        spread = (self.pool(image.square()) - mean.square()).clamp(min=1e-6).sqrt()
        return torch.relu(self.layer(torch.cat([mean, spread], dim=1).flatten(1)))
