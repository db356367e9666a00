"""Encoders of the three views of TRIPLEX: a tile, what is around it, the whole section."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stexp.data.batches import nearest
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.pathology import ConchV15


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP, both residual; to itself, or to other tokens, which go through the same norm."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.ff = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(
        self, x: torch.Tensor, other: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, L, D) that attend to `other` (B, M, D), themselves where None -> (B, L, D).

        `mask`, broadcast to (B, heads, L, M), is added to the logits, or False where a token is not seen.
        """
        normed = self.attn_norm(x)
        seen = normed if other is None else self.attn_norm(other)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(normed), *self.to_kv(seen).chunk(2, dim=2))
        )
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.ff(self.ff_norm(x))


class PositionEncoding(nn.Module):
    """Depthwise convolution over the array, added to the tokens; spots that are not there count as zero.

    The original (PEGH, in the paper APEG) scatters the tokens on a dense grid. Here each spot gathers its
    neighbours, which is the same sum, in memory that does not grow with the array.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
        """Tokens (N, D) of a section, `around` as :func:`array_neighbours` has it -> (N, D)."""
        padded = torch.cat([x, torch.zeros_like(x[:1])])
        assert self.conv.bias is not None  # Conv2d has one unless it is told not to
        return x + self.conv.bias + torch.einsum("nkd,dk->nd", padded[around], self.conv.weight.flatten(1))


def array_neighbours(array_xy: np.ndarray, size: int) -> np.ndarray:
    """For each of N spots the rows of those in the size x size block of the array around it; N where there is none.

    Returns
    -------
    (N, size * size) int64
        The weights of a convolution along x, then y, meet them in this order.
    """
    steps = np.arange(size) - size // 2
    offset = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    row = {place: i for i, place in enumerate(map(tuple, array_xy.tolist()))}
    places = (array_xy[:, None] + offset).reshape(-1, 2).tolist()
    return np.array([row.get(place, len(array_xy)) for place in map(tuple, places)]).reshape(len(array_xy), -1)


class GlobalEncoder(nn.Module):
    """Self-attention over all spots of a section, with the position encoding after the first block."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, dropout: float, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads, hidden, dropout) for _ in range(depth))
        self.position = PositionEncoding(dim, size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        first, *others = self.blocks
        x = self.position(first(x[None])[0], around)[None]
        for block in others:
            x = block(x)
        return self.norm(x[0])


class NeighbourEncoder(nn.Module):
    """Self-attention within a neighbourhood of k x k places, with a learned bias per distance across and down."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, dropout: float, k: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads, hidden, dropout) for _ in range(depth))
        self.bias = nn.Parameter(torch.zeros(depth, heads, k * k))
        self.norm = nn.LayerNorm(dim)
        self.k = k

    def forward(self, x: torch.Tensor, seen: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, D) -> (B, T, D).

        Parameters
        ----------
        seen : (B, T) bool
            Tokens that are attended to.
        place : (B or 1, T, 2)
            Where they lie, in places of the grid.
        """
        apart = (place[:, :, None] - place[:, None]).abs().round().clamp(max=self.k - 1).long()
        index = apart[..., 1] * self.k + apart[..., 0]
        for block, bias in zip(self.blocks, self.bias, strict=True):
            mask = bias[:, index].transpose(0, 1).masked_fill(~seen[:, None, None], -torch.inf)
            x = block(x, mask=mask)
        return self.norm(x)


def feature_map(encoder: ImageEncoder, image: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..1 to the features (B, T, F) that the encoder pools, without class tokens."""
    model = map_model(encoder)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
        features = model.forward_features(encoder.prepare(image))
    if features.ndim == 4 and features.shape[1] == model.num_features:
        return features.flatten(2).transpose(1, 2)
    if features.ndim == 4:
        return features.flatten(1, 2)
    return features[:, getattr(model, "num_prefix_tokens", 0) :]


def map_model(encoder: ImageEncoder) -> Any:
    """The timm model that makes an encoder's feature map; CONCH v1.5 has one inside."""
    return encoder.model.trunk if isinstance(encoder.model, ConchV15) else encoder.model


def nearest_spots(xy: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spot itself and its n - 1 nearest, for each of N spots of a section.

    Returns
    -------
    rows, seen, place : (N, n) int64, (N, n) bool, (N, n, 2) float32
        A section with fewer spots repeats the spot, not seen. Places are in steps, the median distance between
        nearest spots.
    """
    itself = np.arange(len(xy))[:, None]
    others = nearest(xy, n - 1)
    missing = np.repeat(itself, n - 1 - others.shape[1], axis=1)
    rows = np.concatenate([itself, others, missing], axis=1)
    seen = np.arange(n)[None].repeat(len(xy), axis=0) <= others.shape[1]
    step = np.median(np.linalg.norm(xy[others[:, 0]] - xy, axis=1)) if others.shape[1] else 1.0
    return rows, seen, (xy[rows] / step).astype(np.float32)
